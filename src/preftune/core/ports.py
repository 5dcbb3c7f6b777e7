"""Protocols between rooms that must not import each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from preftune.core.records import Message


class ChatTokenizer(Protocol):
    """What the data room needs of a tokenizer; implemented in ``modeling.load``."""

    @property
    def bos_id(self) -> int | None:
        """The beginning token, or None."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a generation: the tokenizer's and the generation config's."""

    @property
    def end_id(self) -> int:
        """The token that is appended to a completed raw-text completion."""

    @property
    def has_chat_template(self) -> bool:
        """Whether chat rows can be rendered."""

    @property
    def identity(self) -> str:
        """Digest of vocabulary, special tokens and chat template."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The chat template's text for these turns."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised."""

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the character span of each."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""

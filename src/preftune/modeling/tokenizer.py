"""A Hugging Face tokenizer behind the port that the data room knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from preftune.core.errors import BadRow, InputError
from preftune.core.ids import digest_json
from preftune.core.records import Message

PROBE = "preftune"


class HubTokenizer:
    """Implements ``core.ports.ChatTokenizer``.

    Parameters
        raw: the Hugging Face tokenizer; ``.raw`` gives it back.
        eos_ids: tokens that end a generation by the model's generation config; the tokenizer's own is added, and the
            token that the chat template puts behind an answer where it is a special one.
        name: the model, for messages.
    """

    def __init__(self, raw: PreTrainedTokenizerBase, eos_ids: Sequence[int] = (), name: str = "model") -> None:
        if not raw.is_fast:
            raise InputError(f"{name}: its tokenizer has no tokenizer.json (character offsets are needed); convert it first")
        self.raw = raw
        self.name = name
        self._stated_eos = tuple(eos_ids)

    @property
    def bos_id(self) -> int | None:
        """The beginning token, or None."""
        return cast("int | None", self.raw.bos_token_id)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a generation."""
        ids = set(self._stated_eos)
        own = self.raw.eos_token_id
        if isinstance(own, int):
            ids.add(own)
        turn_end = self._turn_end()
        return frozenset(ids if turn_end is None else ids | {turn_end})

    @property
    def end_id(self) -> int:
        """The token that ends a completed raw-text completion; InputError where the model has none."""
        own = self.raw.eos_token_id
        if isinstance(own, int):
            return own
        if self._stated_eos:
            return self._stated_eos[0]
        raise InputError(f"{self.name}: neither tokenizer nor generation_config.json names an end token; set eos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether chat rows can be rendered."""
        return bool(self.raw.chat_template)

    @cached_property
    def identity(self) -> str:
        """Digest of vocabulary, special tokens, end tokens and chat template."""
        raw = cast(Any, self.raw)
        special = {name: str(value) for name, value in self.raw.special_tokens_map.items()}
        return digest_json([raw.backend_tokenizer.to_str(), special, self.raw.chat_template, sorted(self.eos_ids)])

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The chat template's text for these turns; BadRow where the template refuses them."""
        if not self.has_chat_template:
            raise InputError(f"{self.name}: has no chat template; set chat_template: chatml, plain or a file")
        try:
            text = self.raw.apply_chat_template(
                [message.to_dict() for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            raise BadRow("template_refused", f"the chat template refuses these turns: {_line(error)}") from None
        return cast(str, text)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised."""
        return cast("list[int]", self.raw(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the character span of each."""
        row = self.raw(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        offsets = cast("list[tuple[int, int]]", row["offset_mapping"])
        return cast("list[int]", row["input_ids"]), [(int(start), int(stop)) for start, stop in offsets]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        text = self.raw.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def _turn_end(self) -> int | None:
        """The special token that the chat template writes behind an answer, if it is one token."""
        if not self.has_chat_template:
            return None
        try:
            turns = (Message("user", "a"), Message("assistant", PROBE))
            tail = self.render(turns, add_generation_prompt=False).rpartition(PROBE)[2].strip()
        except BadRow:
            return None
        ids = self.encode(tail, add_special_tokens=False) if tail else []
        special = {number for number, token in self.raw.added_tokens_decoder.items() if token.special}
        return ids[0] if ids and ids[0] in special else None


def template_text(choice: str) -> str:
    """The template that a recipe's ``chat_template`` names: a built-in one or a file."""
    from preftune.data.chat import BUILTIN_TEMPLATES

    if choice in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[choice]
    path = Path(choice)
    if not path.is_file():
        known = ", ".join(BUILTIN_TEMPLATES)
        raise InputError(f"chat_template {choice!r}: no such file; write {known} or the path of a Jinja file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat_template {choice!r} cannot be read: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

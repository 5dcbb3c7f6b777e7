"""The text of an answer while it grows, and single tokens as text and bytes."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, cast

from preftune.modeling.tokenizer import HubTokenizer

HALF_A_LETTER = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class GrowingText:
    """Turns tokens into text piece by piece; the pieces add up to the decoded whole, and hold whole letters only.

    Only a few tokens are decoded at a time: those since the last letter that was whole, and those of the piece before,
    because a tokenizer may write a token differently at the start of a text.
    """

    def __init__(self, tokenizer: HubTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0  # where the piece before starts
        self._done = 0  # tokens whose text has been given out

    def add(self, token: int) -> str:
        """The text that is new and whole after a token, perhaps none."""
        self._ids.append(token)
        return self._take(is_last=False)

    def finish(self) -> str:
        """What is left, half letters included."""
        return self._take(is_last=True)

    def _take(self, *, is_last: bool) -> str:
        known = self._tokenizer.decode(self._ids[self._before : self._done])
        text = self._tokenizer.decode(self._ids[self._before :])
        if len(text) <= len(known) or (text.endswith(HALF_A_LETTER) and not is_last):
            return ""
        self._before, self._done = self._done, len(self._ids)
        return text[len(known) :]


def token_text(tokenizer: HubTokenizer, token: int) -> str:
    """One token as text, special ones written out; half letters as the replacement character."""
    return tokenizer.decode([token], skip_special_tokens=False)


def token_bytes(tokenizer: HubTokenizer, token: int) -> list[int]:
    """One token as bytes of UTF-8, exact also where it is a part of a letter."""
    raw = cast(Any, tokenizer.raw)
    piece = raw.convert_ids_to_tokens(token)
    found = _BYTE.fullmatch(piece or "")
    if found:
        return [int(found.group(1), 16)]
    text = token_text(tokenizer, token)
    if HALF_A_LETTER in text and piece and all(letter in _byte_of() for letter in piece):
        return [_byte_of()[letter] for letter in piece]
    return list(text.encode())


@cache
def _byte_of() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as (GPT-2's ``bytes_to_unicode``, turned round)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}

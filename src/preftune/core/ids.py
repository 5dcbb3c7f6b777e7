"""Content hashes: the same content has the same id on every machine and in every process."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

DIGEST_BYTES = 16


def digest_bytes(*parts: bytes) -> str:
    """Hex digest of byte strings; lengths are hashed too, so that no two splits of one string agree.

    >>> digest_bytes(b"ab", b"c") == digest_bytes(b"a", b"bc")
    False
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON value; key order does not matter. Lone surrogates, which JSON can escape, are hashed as they are.

    >>> digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return digest_bytes(text.encode("utf-8", "surrogatepass"))


def digest_file(path: str | os.PathLike[str]) -> str:
    """Digest of a file's bytes, read in blocks."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()

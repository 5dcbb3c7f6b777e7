"""Compiling and loading our own C++ code (``native/``): for one kind of processor, where it runs, into torch's cache."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, cast

import torch

VECTOR = 16
"""Floats of a vector; widths come in whole ones."""


def can_run_natively() -> bool:
    """Whether this processor has the instructions (AVX512-BF16) and none that make plain products faster still (AMX)."""
    return _has("_is_avx512_bf16_supported") and not _has("_is_amx_tile_supported")


def _has(name: str) -> bool:
    """What torch says of the processor; it has no public name for it, and older ones none at all."""
    asked = getattr(torch.cpu, name, None)
    return asked is not None and bool(asked())


def load(name: str) -> Any:
    """The library of ``native/NAME.cpp``; its functions take addresses, and return nothing.

    Raises
        Exception: whatever torch's compiler raises where it has no C++ compiler, or one that does not know the instructions.
    """
    from torch._inductor.codecache import CppCodeCache  # seconds, and only for those who compile

    return cast(Any, CppCodeCache).load(_text(f"{name}.cpp"))


def _text(name: str) -> str:
    """A source file with those of ``native/`` that it includes; the builder takes one text."""
    text = files("preftune.modeling").joinpath("native", name).read_text("utf-8")
    return re.sub(r'^#include "(.+)"$', lambda found: _text(found[1]), text, flags=re.MULTILINE)


def integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Numbers as a library reads them, int64; whoever hands their address over keeps them until the call is done."""
    return (ctypes.c_int64 * len(values))(*values)


def function(symbol: Any, num_pointers: int, *others: Any) -> Any:
    """A function of a library: addresses, then arguments of these types."""
    symbol.argtypes = [*[ctypes.c_void_p] * num_pointers, *others]
    symbol.restype = None
    return symbol

"""Compiling and loading our own C++ code (``native/``): for one kind of processor, where it runs, into torch's cache."""

from __future__ import annotations

import ctypes
import re
from importlib.resources import files
from typing import Any, cast

import torch

VECTOR = 16
"""Floats of a vector; widths come in whole ones."""


def can_run_natively() -> bool:
    """Whether this processor has the instructions (AVX512-BF16) and none that make plain products faster still (AMX)."""
    has = cast(Any, torch.cpu)
    return bool(has._is_avx512_bf16_supported()) and not bool(has._is_amx_tile_supported())  # noqa: SLF001 (torch has no public name for it)


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


def function(symbol: Any, num_pointers: int, *others: Any) -> Any:
    """A function of a library: addresses, then arguments of these types."""
    symbol.argtypes = [*[ctypes.c_void_p] * num_pointers, *others]
    symbol.restype = None
    return symbol

"""Kernels compiled by torch.compile, each with its eager form to go back to.

Compiling is worth its time on long stages only (docs/adr/0035). Whatever goes wrong, a missing C++ compiler, a region that
does not compile, the limit on recompilations, which torch itself passes over in silence, is told once, in words, and the
region runs eager from there on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from preftune.modeling import kernels
from preftune.modeling.kernels import EAGER, Kernels
from preftune.modeling.native_attention import NativeAttention, can_run_natively

WORTH_STEPS = 1000
"""Optimiser steps that pay for compiling (20 to 45 s at its first time on two cores, 5 s from torch's cache afterwards)."""
REGIONS = ("rms", "add_rms", "rms_backward", "rotate", "rotate_backward", "swiglu", "swiglu_backward", "token_softmax")


class Region:
    """A function compiled at its first call with shapes that may change; eager for good after its first failure.

    Parameters
        name: a function of :mod:`preftune.modeling.kernels`. tell: is called with one sentence at a failure.
    """

    def __init__(self, name: str, tell: Callable[[str], None]) -> None:
        self.name = name
        self._eager = getattr(EAGER, name) or getattr(kernels, name)
        self._tell = tell
        # fullgraph: a recompilation over the limit raises instead of falling back silently
        self._compiled: Callable[..., Any] | None = torch.compile(getattr(kernels, name), dynamic=True, fullgraph=True)

    def __call__(self, *given: Any) -> Any:
        """What the function returns."""
        if self._compiled is not None:
            # without what autograd knows of them: torch compiles anew for every mix of requires_grad and of views
            bare = [one.data if isinstance(one, Tensor) else one for one in given]
            try:
                return self._compiled(*bare)
            except Exception as error:  # noqa: BLE001 (compilers raise anything; the eager form raises what is the input's fault)
                found = self._eager(*given)
                self._compiled = None
                self._tell(f"{self.name} runs uncompiled: {type(error).__name__}: {_line(error)}")
                return found
        return self._eager(*given)


def choose_kernels(
    wanted: Literal["auto", "on", "off"], device: torch.device, num_steps: int, tell: Callable[[str], None]
) -> Kernels:
    """Compiled kernels where they are wanted and can be had, else ``EAGER``; ``auto`` wants them from ``WORTH_STEPS`` on.

    It depends on the recipe and the machine alone, so that a run that is resumed computes as it did. ``tell`` hears why
    kernels that were wanted are not compiled.
    """
    if wanted == "off" or (wanted == "auto" and num_steps < WORTH_STEPS):
        return EAGER
    reason = why_not_compiled(device)
    if reason:
        tell(reason)
        return EAGER
    return compiled_kernels(tell)


def why_not_compiled(device: torch.device) -> str:
    """What torch.compile lacks on this machine, and the way out; empty where it lacks nothing."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler was found; install g++ (or set CXX), or write compile: 'off'"
    return ""


def compiled_kernels(tell: Callable[[str], None]) -> Kernels:
    """The kernels, compiled region by region; ``tell`` hears of every region that falls back."""
    regions = {name: Region(name, tell) for name in REGIONS}
    attention = _native_attention(tell)
    return Kernels("compiled" if attention is None else "compiled+native", **regions, attention=attention)


def _native_attention(tell: Callable[[str], None]) -> NativeAttention | None:
    """The kernel for attention, where this processor has what it takes."""
    if not can_run_natively():
        return None
    try:
        return NativeAttention()
    except Exception as error:  # noqa: BLE001 (compilers raise anything)
        tell(f"attention runs uncompiled: {type(error).__name__}: {_line(error)}")
        return None


def _line(error: BaseException) -> str:
    """The first two lines: torch names the failing backend in the first and what failed in the second."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])[:300]

"""Kernels that are compiled, each with its eager form to go back to: our own for one kind of processor, or torch.compile's.

Compiling is worth its time on long stages only (docs/adr/0035). Whatever goes wrong, a missing C++ compiler, a region that
does not compile, the limit on recompilations, which torch itself passes over in silence, is told once, in words, and the
region runs eager from there on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from preftune.modeling import kernels
from preftune.modeling.kernels import EAGER, Kernels
from preftune.modeling.native_attention import NativeAttention
from preftune.modeling.native_code import can_run_natively
from preftune.modeling.native_elementwise import NativeElementwise
from preftune.modeling.native_low_rank import NativeLowRank

WORTH_STEPS = 1000
"""Optimiser steps that pay for compiling (20 to 45 s at its first time on two cores, 5 s from torch's cache afterwards)."""
NATIVE_WORTH_STEPS = 50
"""Optimiser steps that pay for our own kernels (10 s at their first time, 2 s from torch's cache; 15 % of a step)."""
REGIONS = ("rms", "add_rms", "rms_backward", "rotate", "rotate_backward", "swiglu", "swiglu_backward", "token_softmax")


class Region:
    """A function compiled at its first call with shapes that may change; eager for good after its first failure.

    Parameters
        name: a function of :mod:`preftune.modeling.kernels`. tell: is called with one sentence at a failure.
    """

    def __init__(self, name: str, tell: Callable[[str], None]) -> None:
        self.name = name
        self._eager = _eager(name)
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
    wanted: Literal["auto", "on", "off"], device: torch.device, dtype: torch.dtype, num_steps: int, tell: Callable[[str], None]
) -> Kernels:
    """Compiled kernels where they are wanted and can be had, else ``EAGER``; ``auto`` wants them where they pay.

    They are our own for bfloat16 on a CPU that has the instructions, which pay from ``NATIVE_WORTH_STEPS`` on, and elsewhere
    those of torch.compile, from ``WORTH_STEPS`` on. It depends on the recipe and the machine alone, so that a run that is
    resumed computes as it did. ``tell`` hears why kernels that were wanted are not compiled.
    """
    is_native = device.type == "cpu" and dtype == torch.bfloat16 and can_run_natively()
    if wanted == "off" or (wanted == "auto" and num_steps < (NATIVE_WORTH_STEPS if is_native else WORTH_STEPS)):
        return EAGER
    reason = why_not_compiled(device)
    if reason:
        tell(reason)
        return EAGER
    return (native_kernels(tell) if is_native else None) or compiled_kernels(tell)


def why_not_compiled(device: torch.device) -> str:
    """What torch.compile lacks on this machine, and the way out; empty where it lacks nothing."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler was found; install g++ (or set CXX), or write compile: 'off'"
    return ""


def compiled_kernels(tell: Callable[[str], None]) -> Kernels:
    """The kernels by torch.compile, region by region; ``tell`` hears of every region that falls back."""
    regions: dict[str, Any] = {name: Region(name, tell) for name in REGIONS}
    return Kernels("compiled", **regions)


def native_kernels(tell: Callable[[str], None]) -> Kernels | None:
    """Our own kernels, and eager functions for what these do not take. None where they do not compile; ``tell`` hears why."""
    try:
        elementwise, attention, low_rank = NativeElementwise(), NativeAttention(), NativeLowRank()
    except Exception as error:  # noqa: BLE001 (compilers raise anything)
        tell(f"our own kernels are not used: {type(error).__name__}: {_line(error)}")
        return None
    regions: dict[str, Any] = {name: _natively(getattr(elementwise, name), _eager(name)) for name in REGIONS}
    return Kernels("native", **regions, attention=attention, low_rank=low_rank)


def _natively(own: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        found = own(*given)
        return eager(*given) if found is None else found

    return run


def _eager(name: str) -> Callable[..., Any]:
    """A region as it runs where nothing is compiled."""
    return cast(Callable[..., Any], getattr(EAGER, name) or getattr(kernels, name))


def _line(error: BaseException) -> str:
    """The first two lines: torch names the failing backend in the first and what failed in the second."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])[:300]

"""AdamW whose moments are kept in 8 bits, by bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861).

Each block of 256 values of a moment shares a float32 scale, and a byte picks one of 256 values of a fixed map. Parameters of
under 4,096 values keep float32 moments. Masters and gradients stay float32: two of the eight bytes of the moments are left.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

import torch

from preftune.core.errors import UsageError

MISSING = "needs the package bitsandbytes; pip install 'preftune[quant]', or write optimizer: adamw"
KINDS = ("state1", "state2", "absmax1", "absmax2")
"""What bitsandbytes keeps for a parameter of its own, beside its step count; the maps are constants."""


def adamw_8bit(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """The optimiser over groups of parameters with ``weight_decay``; UsageError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"optimizer: adamw_8bit {MISSING}")
    import bitsandbytes

    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=0.0, betas=betas, eps=eps)
    return made


def restored(state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """A parameter's state as bitsandbytes keeps it, from what a checkpoint holds; the state of float32 moments is left alone."""
    if "state1" not in state:
        return state
    maps = cast(Any, optimiser).name2qmap
    device = state["state1"].device
    found = {**state, "step": int(state["step"])}
    if "absmax1" in state:
        found |= {"qmap1": maps["dynamic"].to(device), "qmap2": maps["udynamic"].to(device)}
    return found

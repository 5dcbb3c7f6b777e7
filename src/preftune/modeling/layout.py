"""Where the groups of a pack lie, as it travels through a model's forward to its attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from preftune.data.pack import Group
from preftune.modeling.group_parts import Part, hidden_mask
from preftune.modeling.kernels import EAGER, Kernels
from preftune.modeling.laid_out import LaidOut

if TYPE_CHECKING:
    from preftune.modeling.group_attention import Place
    from preftune.modeling.varlen import Segments

PlacesKey: TypeAlias = tuple[int | None, int, torch.dtype, torch.device]
MaskKey: TypeAlias = tuple[int, tuple[int, ...], int | None, int, Part]


@dataclass(frozen=True, slots=True)
class Call:
    """What one attention layer asked for, recorded while a probe runs."""

    module: str
    window: int | None
    softcap: float | None
    has_sinks: bool


class Watcher(Protocol):
    """Sees the input of every layer that would run as a fused block (:class:`preftune.modeling.block.Trial`)."""

    def see(self, layer: nn.Module, block: Any, x: Tensor, kwargs: dict[str, Any]) -> None:
        """x (1, T, d) and the other arguments of the layer's forward."""


@dataclass(frozen=True, slots=True, eq=False)
class PairLayout:
    """Where the groups of a pack lie, and what its layers share.

    trace: a list that every attention call is written to (certificates); None in normal work. kernels: the elementwise
    arithmetic of fused blocks. rows: the positions whose hidden states are wanted; a last layer that leaves the others out
    writes how many into ``taken``. trial: sees layers instead of running them fused. places: of the parts of groups on a
    CPU, and segments of the variable-length kernels, each made once a pack. laid: of fused blocks, their weights as they
    are laid out for products.
    """

    groups: tuple[Group, ...]
    trace: list[Call] | None = None
    masks: dict[MaskKey, Tensor] = field(default_factory=dict)
    kernels: Kernels = EAGER
    rows: Tensor | None = None
    taken: list[int] = field(default_factory=list)
    trial: Watcher | None = None
    places: dict[PlacesKey, list[Place]] = field(default_factory=dict)
    segments: dict[torch.device, Segments] = field(default_factory=dict)
    laid: Mapping[nn.Module, tuple[LaidOut | None, ...]] = field(default_factory=dict)

    def mask(self, group: Group, window: int | None, repeats: int, part: Part, like: Tensor) -> Tensor:
        """Additive mask of a part of a group, for ``repeats`` heads: (repeats * rows, keys), 0 where seen, -inf where hidden."""
        if window is not None and window >= group.prompt + max(group.completions):
            window = None  # a window that hides nothing shares the mask of the full layers
        key = (group.prompt, group.completions, window, repeats, part)
        if key not in self.masks:
            hidden = hidden_mask(group.prompt, group.completions, window, part)
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).repeat(repeats, 1)
            self.masks[key] = mask.to(dtype=like.dtype, device=like.device)
        return self.masks[key]

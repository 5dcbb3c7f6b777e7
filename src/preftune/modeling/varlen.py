"""Attention of a whole pack in one variable-length call of the GPU's flash kernel, without a mask.

The kernel takes segments of queries and of keys that differ in number, and aligns their causal masks at the lower right:
query i of q_s sees keys 0 ... k_s - q_s + i of its segment. So every prompt with its first completion is a segment of equal
numbers, and every other completion one whose queries are the completion and whose keys are prompt and completion:

    row       p p p | c c c | r r              segments    queries        keys
                                               0           p p p c c c    p p p c c c
                                               1           r r            p p p r r

Queries stand in the row's own order, so they are not moved; keys and values are gathered, each prompt once a completion.
A window counts positions, and in a segment the distance of two tokens is the distance of their positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from preftune.data.pack import Group

if TYPE_CHECKING:
    from preftune.modeling.layout import PairLayout


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a pack on a device: cumulative numbers (segments + 1,) int32, the largest, and where the keys stand.

    keys: (total keys,) place in the row of each key, segment after segment; None where they are the row itself.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    keys: Tensor | None


def segments_of(groups: tuple[Group, ...], device: torch.device) -> Segments:
    """The segments of a pack whose groups fill the row one after the other."""
    queries: list[int] = []
    places: list[list[int]] = []
    for group in groups:
        prompt = list(range(group.start, group.start + group.prompt))
        at = group.start + group.prompt
        for number, length in enumerate(group.completions):
            queries.append(length + (group.prompt if number == 0 else 0))
            places.append([*prompt, *range(at, at + length)])
            at += length
    sizes = [len(place) for place in places]
    flat = [place for segment in places for place in segment]
    is_row = flat == list(range(len(flat)))
    cu_q, cu_k = (torch.tensor([0, *accumulate(one)], dtype=torch.int32, device=device) for one in (queries, sizes))
    return Segments(cu_q, cu_k, max(queries), max(sizes), None if is_row else torch.tensor(flat, device=device))


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes such heads: 16 bits, one width of at most 256, a multiple of 8."""
    width = q.shape[-1]
    return kernel() is not None and q.dtype in (torch.bfloat16, torch.float16) and width == v.shape[-1] <= 256 and width % 8 == 0


@cache
def kernel() -> Callable[..., Tensor] | None:
    """torch's variable-length attention where this torch has it with causal windows, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    named = inspect.signature(varlen_attn).parameters
    return cast(Callable[..., Tensor], varlen_attn) if {"window_size", "scale"} <= set(named) else None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PairLayout,
    scale: float,
    window: int | None,
    core: Callable[..., Tensor] | None = None,
) -> Tensor:
    """q (1, H, T, D), k and v (1, K, T, D) of a pack that its groups fill -> (1, T, H, D).

    core: the kernel, torch's own unless a test gives one with the same meaning.
    """
    run: Any = kernel() if core is None else core
    segments = layout.segments.get(q.device)
    if segments is None:
        segments = layout.segments[q.device] = segments_of(layout.groups, q.device)
    rows, keys, values = (one[0].transpose(0, 1) for one in (q, k, v))
    if segments.keys is not None:
        keys, values = keys.index_select(0, segments.keys), values.index_select(0, segments.keys)
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(run).parameters:
            options["enable_gqa"] = True
        else:  # torch before it had the option, 2.11 for one: each key head once for every query head that reads it
            keys, values = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (keys, values))
    out = run(
        rows.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        segments.cu_q,
        segments.cu_k,
        segments.max_q,
        segments.max_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return cast(Tensor, out)[None]

"""Attention of short groups on a CPU: batched products over the key heads, one autograd Function for a whole pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from preftune.data.pack import Group
from preftune.modeling.group_parts import PART_CELLS, Span, parts_of
from preftune.modeling.layout import PairLayout

KEPT_TOKENS = 512
"""Up to this size of a group its probabilities are kept for backward; those of larger ones are computed again."""


def group_attention(q: Tensor, k: Tensor, v: Tensor, layout: PairLayout, scale: float, window: int | None) -> Tensor:
    """Softmax attention of every group: q (1, H, T, D), k (1, K, T, D), v (1, K, T, E) -> (1, T, H, E)."""
    return cast(Tensor, GroupAttention.apply(q, k, v, layout, scale, window))  # type: ignore[no-untyped-call]  # torch leaves it untyped


class GroupAttention(torch.autograd.Function):
    """The Function behind :func:`group_attention`.

    One for all groups of a pack and none per slice: autograd's copies for slices cost as much as the products themselves.
    A group's rows meet its keys part by part (:mod:`preftune.modeling.group_parts`), so that most of what is hidden is never
    formed. Softmax sums in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PairLayout, scale: float, window: int | None) -> Tensor:
        """Outputs of every group, and its probabilities where they will be wanted again."""
        _, heads, tokens, width = q.shape
        kv_heads, out_width = k.shape[1], v.shape[3]
        repeats, is_training = heads // kv_heads, any(ctx.needs_input_grad[:3])
        out = q.new_empty(tokens, heads, out_width)
        kept: list[Tensor | None] = []
        for place in _places(layout, window, repeats, q):
            queries = q[0, :, place.rows].reshape(kv_heads, -1, width)  # heads that share a key head are rows of one product
            p = _probabilities(queries, place.keys_of(k), place.mask, scale)
            out[place.rows].copy_(torch.bmm(p, place.keys_of(v)).view(heads, -1, out_width).transpose(0, 1))
            kept.append(p if is_training and place.is_kept else None)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        return out[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        q, k, v, *kept = ctx.saved_tensors
        _, heads, tokens, width = q.shape
        kv_heads, out_width = k.shape[1], v.shape[3]
        layout, scale, grad = ctx.layout, ctx.scale, grads[0][0]
        # laid out (tokens, heads, D), as the projections that made q, k and v want their gradients
        dq = q.new_empty(tokens, heads, width)
        dk, dv = k.new_zeros(tokens, kv_heads, width), v.new_zeros(tokens, kv_heads, out_width)
        for place in reversed(_places(layout, ctx.window, heads // kv_heads, q)):
            p = kept.pop()
            rows, past, values = place.rows, place.keys_of(k), place.keys_of(v)
            queries = q[0, :, rows].reshape(kv_heads, -1, width)
            if p is None:
                p = _probabilities(queries, past, place.mask, scale)
            do = grad[rows].transpose(0, 1).reshape(kv_heads, -1, out_width)
            ds = _softmax_backward(p, torch.bmm(do, values.transpose(1, 2)))
            dq[rows].copy_(_scaled(ds, past, scale).view(heads, -1, width).transpose(0, 1))
            of_v = torch.bmm(p.transpose(1, 2), do).transpose(0, 1)
            of_k = _scaled(ds.transpose(1, 2), queries, scale).transpose(0, 1)
            at = 0
            for keys in place.keys:
                count = keys.stop - keys.start
                dv[keys].add_(of_v[at : at + count])
                dk[keys].add_(of_k[at : at + count])
                at += count
        return dq.transpose(0, 1)[None], dk.transpose(0, 1)[None], dv.transpose(0, 1)[None], None, None, None


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a group in the pack's row: its rows, its keys in one span or two, and their additive mask.

    is_kept: its probabilities are kept for backward.
    """

    rows: slice
    keys: tuple[slice, ...]
    mask: Tensor
    is_kept: bool

    def keys_of(self, x: Tensor) -> Tensor:
        """The part's keys or values of x (1, K, T, D): (K, keys, D); a view where they lie in one span."""
        spans = [x[0, :, span] for span in self.keys]
        return spans[0] if len(spans) == 1 else torch.cat(spans, 1)


def _places(layout: PairLayout, window: int | None, repeats: int, like: Tensor) -> list[Place]:
    """Every part of every group in the order of their rows; found once for all layers that see as far."""
    key = (window, repeats, like.dtype, like.device)
    if key not in layout.places:
        layout.places[key] = [
            Place(
                _within(group, part.rows),
                tuple(_within(group, span) for span in part.keys),
                layout.mask(group, window, repeats, part, like),
                group.num_tokens <= KEPT_TOKENS,
            )
            for group in layout.groups
            for part in parts_of(group.prompt, group.completions, PART_CELLS)
        ]
    return layout.places[key]


def _within(group: Group, span: Span) -> slice:
    """A span of the group's tokens in the pack's row."""
    return slice(group.start + span[0], group.start + span[1])


def _probabilities(rows: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(rows keys^T * scale + mask): (kv_heads, heads per kv head * n, m) in the dtype of rows; sums in float32."""
    return torch.softmax(torch.baddbmm(mask.expand(rows.shape[0], -1, -1), rows, keys.transpose(1, 2), alpha=scale), -1)


def _softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """p * (dp - sum(p * dp)), summed in float32, in the dtype of p."""
    return torch._softmax_backward_data(dp, p, -1, p.dtype)  # noqa: SLF001 (the operator behind softmax)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a b, scaled before it is rounded and without a pass over a: (K, n, m) and (K, m, D) -> (K, n, D)."""
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scale)

"""Attention of short groups on a CPU: batched products over the key heads, one autograd Function for a whole pack."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from preftune.data.pack import Group
from preftune.modeling.group_parts import PART_CELLS, Part, Span, parts_of
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
        for group, part in _parts(layout):
            mask = layout.mask(group, window, repeats, part, q)
            rows = _within(group, part.rows)
            queries = q[0, :, rows].reshape(kv_heads, -1, width)  # heads that share a key head are rows of one product
            p = _probabilities(queries, _keys(k, group, part), mask, scale)
            out[rows] = torch.bmm(p, _keys(v, group, part)).view(heads, -1, out_width).transpose(0, 1)
            kept.append(p if is_training and group.num_tokens <= KEPT_TOKENS else None)
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
        for group, part in reversed(_parts(layout)):
            p = kept.pop()
            rows, past, values = _within(group, part.rows), _keys(k, group, part), _keys(v, group, part)
            queries = q[0, :, rows].reshape(kv_heads, -1, width)
            if p is None:
                p = _probabilities(queries, past, layout.mask(group, ctx.window, heads // kv_heads, part, q), scale)
            do = grad[rows].transpose(0, 1).reshape(kv_heads, -1, out_width)
            ds = _softmax_backward(p, torch.bmm(do, values.transpose(1, 2)), scale)
            dq[rows] = torch.bmm(ds, past).view(heads, -1, width).transpose(0, 1)
            of_v = torch.bmm(p.transpose(1, 2), do).transpose(0, 1)
            of_k = torch.bmm(ds.transpose(1, 2), queries).transpose(0, 1)
            at = 0
            for first, end in part.keys:
                keys, count = _within(group, (first, end)), end - first
                dv[keys] += of_v[at : at + count]
                dk[keys] += of_k[at : at + count]
                at += count
        return dq.transpose(0, 1)[None], dk.transpose(0, 1)[None], dv.transpose(0, 1)[None], None, None, None


def _parts(layout: PairLayout) -> list[tuple[Group, Part]]:
    """Every part of every group, in the order of their rows."""
    return [(group, part) for group in layout.groups for part in parts_of(group.prompt, group.completions, PART_CELLS)]


def _within(group: Group, span: Span) -> slice:
    """A span of the group's tokens in the pack's row."""
    return slice(group.start + span[0], group.start + span[1])


def _keys(x: Tensor, group: Group, part: Part) -> Tensor:
    """Keys or values (1, K, T, D) of a part: (K, keys, D); a view where they lie in one span."""
    spans = [x[0, :, _within(group, span)] for span in part.keys]
    return spans[0] if len(spans) == 1 else torch.cat(spans, 1)


def _probabilities(rows: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(rows keys^T * scale + mask): (kv_heads, heads per kv head * n, m) in the dtype of rows; sums in float32."""
    return torch.softmax(torch.baddbmm(mask.expand(rows.shape[0], -1, -1), rows, keys.transpose(1, 2), alpha=scale), -1)


def _softmax_backward(p: Tensor, dp: Tensor, scale: float) -> Tensor:
    """(p * (dp - sum(p * dp))) * scale, summed in float32, in the dtype of p."""
    return torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)  # noqa: SLF001 (the operator behind softmax)

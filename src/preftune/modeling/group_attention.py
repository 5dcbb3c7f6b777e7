"""Attention of short groups on a CPU: batched products over the key heads, one autograd Function for a whole pack."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from preftune.data.pack import Group
from preftune.modeling.layout import PairLayout

KEPT_TOKENS = 512
"""Up to this size of a group its probabilities are kept for backward; those of larger ones are computed again."""

SPLIT_TOKENS = 256
"""From this size of a group on its prompt's rows leave out the completions' keys: below, another call costs more."""


def group_attention(q: Tensor, k: Tensor, v: Tensor, layout: PairLayout, scale: float, window: int | None) -> Tensor:
    """Softmax attention of every group: q (1, H, T, D), k (1, K, T, D), v (1, K, T, E) -> (1, T, H, E)."""
    return cast(Tensor, GroupAttention.apply(q, k, v, layout, scale, window))  # type: ignore[no-untyped-call]  # torch leaves it untyped


class GroupAttention(torch.autograd.Function):
    """The Function behind :func:`group_attention`.

    One for all groups of a pack and none per slice: autograd's copies for slices cost as much as the products themselves.
    The rows of a group's prompt meet the keys of the prompt, those of its completions all of the group's, so that half of
    what lies above the diagonal is never formed. Softmax sums in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PairLayout, scale: float, window: int | None) -> Tensor:
        """Outputs of every group, and its probabilities where they will be wanted again."""
        _, heads, tokens, width = q.shape
        kv_heads, out_width = k.shape[1], v.shape[3]
        repeats, is_training = heads // kv_heads, any(ctx.needs_input_grad[:3])
        out = q.new_empty(tokens, heads, out_width)
        kept: list[Tensor | None] = []
        for group in layout.groups:
            mask = layout.mask(group, window, repeats, q)
            for rows, keys in _parts(group):
                queries = q[0, :, rows].reshape(kv_heads, -1, width)  # heads that share a key head are rows of one product
                p = _probabilities(queries, k[0, :, keys], _of(mask, group, rows, keys), scale)
                out[rows] = torch.bmm(p, v[0, :, keys]).view(heads, -1, out_width).transpose(0, 1)
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
        dq, dk, dv = (x.new_empty(tokens, x.shape[1], x.shape[3]) for x in (q, k, v))
        for group in reversed(layout.groups):
            # the completions' rows first, for they meet all keys of the group; then the prompt's add to them
            for number, (row_span, key_span) in enumerate(reversed(_parts(group))):
                p = kept.pop()
                queries, past, values = q[0, :, row_span].reshape(kv_heads, -1, width), k[0, :, key_span], v[0, :, key_span]
                if p is None:
                    mask = layout.mask(group, ctx.window, heads // kv_heads, q)
                    p = _probabilities(queries, past, _of(mask, group, row_span, key_span), scale)
                do = grad[row_span].transpose(0, 1).reshape(kv_heads, -1, out_width)
                ds = _softmax_backward(p, torch.bmm(do, values.transpose(1, 2)), scale)
                dq[row_span] = torch.bmm(ds, past).view(heads, -1, width).transpose(0, 1)
                of_v = torch.bmm(p.transpose(1, 2), do).transpose(0, 1)
                of_k = torch.bmm(ds.transpose(1, 2), queries).transpose(0, 1)
                if number == 0:
                    dv[key_span], dk[key_span] = of_v, of_k
                else:
                    dv[key_span] += of_v
                    dk[key_span] += of_k
        return dq.transpose(0, 1)[None], dk.transpose(0, 1)[None], dv.transpose(0, 1)[None], None, None, None


def _parts(group: Group) -> list[tuple[slice, slice]]:
    """Rows and the keys that they meet: the prompt and itself, the completions and all; a small group in one part."""
    start, middle, end = group.start, group.start + group.prompt, group.start + group.num_tokens
    if group.num_tokens < SPLIT_TOKENS or not group.prompt:
        return [(slice(start, end), slice(start, end))]
    return [(slice(start, middle), slice(start, middle)), (slice(middle, end), slice(start, end))]


def _of(mask: Tensor, group: Group, rows: slice, keys: slice) -> Tensor:
    """The part of a group's mask (repeats, n, n) that these rows and keys meet in: (repeats * rows, keys)."""
    part = mask[:, rows.start - group.start : rows.stop - group.start, keys.start - group.start : keys.stop - group.start]
    return part.reshape(-1, part.shape[2])


def _probabilities(rows: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(rows keys^T * scale + mask): (kv_heads, heads per kv head * n, m) in the dtype of rows; sums in float32."""
    return torch.softmax(torch.baddbmm(mask.expand(rows.shape[0], -1, -1), rows, keys.transpose(1, 2), alpha=scale), -1)


def _softmax_backward(p: Tensor, dp: Tensor, scale: float) -> Tensor:
    """(p * (dp - sum(p * dp))) * scale, summed in float32, in the dtype of p."""
    return torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)  # noqa: SLF001 (the operator behind softmax)

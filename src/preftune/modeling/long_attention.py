"""Attention of groups too long for a matrix of scores: memory grows with the tokens, not with their square.

A completion's row of scores has two parts, the prompt and the completion itself. Each part is one call of the flash
kernel of the CPU, which gives the part's output o and its log-sum-exp l; together they are

    l = log(exp l_1 + exp l_2),    o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2

and since dscores = p * (do v^T - sum(do * o)) with p = exp(scores - l), the kernel's own backward on one part gives that
part's exact share once it is handed the whole o and l. No mask is formed, no key is copied, the prompt's keys are shared.

What the kernel cannot do (windows, soft caps, sinks, dropout) is written out for a few queries at a time and computed
again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from preftune.data.pack import Group

SCORES_PER_CHUNK = 1 << 23  # of a chunk of queries, over all heads: 32 MB of float32
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 (the operator behind SDPA on a CPU)
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001 (and its backward)

Core: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def long_attention(q: Tensor, k: Tensor, v: Tensor, group: Group, scale: float) -> Tensor:
    """Causal attention of one group that fills its row: q (1, H, T, D), k (1, K, T, D), v (1, K, T, E) -> (1, H, T, E), CPU only.

    The group's ``start`` does not matter: the row is the group.
    """
    width, value_width = q.shape[3], v.shape[3]
    if width != value_width:  # the kernel wants one width; columns of zeros change neither scores nor outputs
        widest = max(width, value_width)
        q, k, v = (nn.functional.pad(one, (0, widest - one.shape[3])) for one in (q, k, v))
    out = cast(Tensor, LongAttention.apply(q, k, v, group, scale))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out[..., :value_width]


class LongAttention(torch.autograd.Function):
    """The Function behind :func:`long_attention`; saves its inputs, its output and one number a query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Group, scale: float) -> Tensor:
        """Outputs of prompt and completions."""
        prompt = group.prompt
        past_k, past_v = k[:, :, :prompt], v[:, :, :prompt]
        outs, lses = [], []
        if prompt:
            out, lse = _FLASH(q[:, :, :prompt], past_k, past_v, 0.0, True, scale=scale)
            outs, lses = [out], [lse]
        for own in _spans(group):
            rows = q[:, :, own]
            out, lse = _FLASH(rows, k[:, :, own], v[:, :, own], 0.0, True, scale=scale)
            if prompt:
                out, lse = _joined(out, lse, *_FLASH(rows, past_k, past_v, 0.0, False, scale=scale))
            outs.append(out)
            lses.append(lse)
        whole, sums = torch.cat(outs, 2), torch.cat(lses, 2)
        ctx.save_for_backward(q, k, v, whole, sums)
        ctx.group, ctx.scale = group, scale
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        q, k, v, out, lse = ctx.saved_tensors
        grad, prompt = grads[0], slice(0, ctx.group.prompt)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

        def part(rows: slice, keys: slice, *, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            """Gradients of these queries (1, H, rows, D), and of these keys and values (1, K, keys, D)."""
            found = _FLASH_BACKWARD(
                grad[:, :, rows],
                q[:, :, rows],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, rows],
                lse[:, :, rows],
                0.0,
                is_causal,
                scale=ctx.scale,
            )
            return cast(tuple[Tensor, Tensor, Tensor], found)

        if ctx.group.prompt:
            dq[:, :, prompt], dk[:, :, prompt], dv[:, :, prompt] = part(prompt, prompt, is_causal=True)
        for own in _spans(ctx.group):
            dq[:, :, own], dk[:, :, own], dv[:, :, own] = part(own, own, is_causal=True)
            if ctx.group.prompt:
                by_prompt = part(own, prompt, is_causal=False)
                for whole, rows, share in zip((dq, dk, dv), (own, prompt, prompt), by_prompt, strict=True):
                    whole[:, :, rows] += share
        return dq, dk, dv, None, None


def in_chunks(core: Core, q: Tensor, k: Tensor, v: Tensor, offset: int, window: int | None) -> Tensor:
    """``core(q, k, v, offset)`` for a few queries at a time, each chunk computed again in backward.

    q (1, H, n, D) are the last n of the keys' tokens, ``offset`` the number before them. With a window a chunk sees
    only the keys that it reaches, so time grows with tokens times window.
    """
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    reach = keys if window is None else min(keys, window)
    rows = max(16, SCORES_PER_CHUNK // (heads * reach))
    if queries <= rows:
        return core(q, k, v, offset)
    parts = []
    for start in range(0, queries, rows):
        stop = min(queries, start + rows)
        first = 0 if window is None else max(0, offset + start - window + 1)
        seen = slice(first, offset + stop)
        given = (q[:, :, start:stop], k[:, :, seen], v[:, :, seen], offset + start - first)
        if torch.is_grad_enabled():
            parts.append(cast(Tensor, torch.utils.checkpoint.checkpoint(core, *given, use_reentrant=False)))
        else:
            parts.append(core(*given))
    return torch.cat(parts, 2)


def _spans(group: Group) -> list[slice]:
    """The tokens of each completion that has any."""
    spans, at = [], group.prompt
    for length in group.completions:
        if length:
            spans.append(slice(at, at + length))
        at += length
    return spans


def _joined(one: Tensor, one_lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over two disjoint sets of keys."""
    lse = torch.logaddexp(one_lse, other_lse)
    share = (one_lse - lse).exp()[..., None] * one + (other_lse - lse).exp()[..., None] * other
    return share.to(one.dtype), lse

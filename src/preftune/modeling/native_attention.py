"""Attention of a pack's groups by our own kernel, for processors that multiply bfloat16 in vectors (AVX512-BF16).

The kernel (``native/group_attention.cpp``, which says how it works) gives what :mod:`preftune.modeling.group_attention`
gives: products of bfloat16 summed in float32, softmax in float32. It forms about two thirds of the scores, none of them
in memory, and takes half of the time; of probabilities nothing is kept for backward but their log-sum-exp.

Symbols: T tokens, H query heads, K key heads, D width of queries and keys, E width of values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from preftune.data.pack import Group
from preftune.modeling.native_code import VECTOR, function, integers, load


class NativeAttention:
    """The kernel, compiled where it runs and kept in torch's cache of compiled code."""

    def __init__(self) -> None:
        library = load("group_attention")
        self._forward = function(library.preftune_attention_forward, 8, ctypes.c_float)
        self._backward = function(library.preftune_attention_backward, 12, ctypes.c_float)

    def takes(self, q: Tensor, k: Tensor, v: Tensor, groups: tuple[Group, ...], window: int | None) -> bool:
        """Whether these are for the kernel: bfloat16 in whole vectors, no window that hides.

        It depends on each group alone, so that a completion has the same bits in whatever pack it stands.
        """
        if any(one.dtype != torch.bfloat16 or one.device.type != "cpu" for one in (q, k, v)):
            return False
        if q.shape[3] % VECTOR or v.shape[3] % VECTOR or any(one.stride(3) != 1 for one in (q, k, v)):
            return False
        return window is None or all(window >= one.prompt + max(one.completions) for one in groups)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, groups: tuple[Group, ...], scale: float) -> tuple[Tensor, Tensor]:
        """q (1, H, T, D), k (1, K, T, D), v (1, K, T, E) -> outputs (T, H, E) and each row's log-sum-exp (H, T), float32."""
        _, heads, tokens, _ = q.shape
        out = q.new_empty(tokens, heads, v.shape[3])
        lse = q.new_empty(heads, tokens, dtype=torch.float32)
        self._forward(*(one.data_ptr() for one in (q, k, v, out, lse)), *_numbers(q, k, v, None, groups), scale)
        return out, lse

    def backward(
        self, grad: Tensor, kept: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], groups: tuple[Group, ...], scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the outputs (T, H, E); q, k, v, outputs, log-sum-exp -> gradients (T, H, D), (T, K, D), (T, K, E)."""
        q, k, v, _, _ = kept
        _, heads, tokens, width = q.shape
        kv_heads, out_width = k.shape[1], v.shape[3]
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        dq, dk = q.new_empty(tokens, heads, width), k.new_empty(tokens, kv_heads, width)
        dv = v.new_empty(tokens, kv_heads, out_width)
        self._backward(*(one.data_ptr() for one in (*kept, grad, dq, dk, dv)), *_numbers(q, k, v, grad, groups), scale)
        return dq, dk, dv


def native_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: tuple[Group, ...], scale: float, window: int | None, kernel: NativeAttention | None
) -> Tensor | None:
    """Softmax attention of every group: q (1, H, T, D), k (1, K, T, D), v (1, K, T, E) -> (1, T, H, E). None if not for it."""
    if kernel is None or scale <= 0 or not kernel.takes(q, k, v, groups, window):
        return None
    return cast(Tensor, NativeGroupAttention.apply(q, k, v, groups, scale, kernel))  # type: ignore[no-untyped-call]  # torch leaves it untyped


class NativeGroupAttention(torch.autograd.Function):
    """:class:`NativeAttention` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: tuple[Group, ...], scale: float, kernel: NativeAttention
    ) -> Tensor:
        """q (1, H, T, D), k (1, K, T, D), v (1, K, T, E) -> (1, T, H, E)."""
        out, lse = kernel.forward(q, k, v, groups, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.groups, ctx.scale, ctx.kernel = groups, scale, kernel
        return out[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        found = ctx.kernel.backward(grads[0][0], ctx.saved_tensors, ctx.groups, ctx.scale)
        dq, dk, dv = (one.transpose(0, 1)[None] for one in found)
        return dq, dk, dv, None, None, None


def _numbers(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, groups: Sequence[Group]) -> list[ctypes.Array[ctypes.c_int64]]:
    """Sizes, strides and groups as the kernel reads them."""
    sizes = (q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.shape[2], len(groups))
    strides = [stride for one in (q, k, v) for stride in (one.stride(2), one.stride(1))]
    strides += (0, 0) if grad is None else (grad.stride(0), grad.stride(1))
    tree = [number for one in groups for number in (one.start, one.prompt, len(one.completions), *one.completions)]
    return [integers(sizes), integers(strides), integers(tree)]

"""The elementwise work of a block by our own kernels (``native/elementwise.cpp``), in bfloat16.

The same arithmetic as in :mod:`preftune.modeling.kernels`, which says what each function computes. torch.compile gives loops
nearly as good; what these save is its entry, a fifth of a millisecond at each of eight calls a layer, and half a minute of
compiling.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from preftune.modeling.native_code import VECTOR, function, integers, load

HALVES = 2 * VECTOR
"""Heads are turned by halves, and each half is whole vectors."""


class NativeElementwise:
    """The kernels, compiled where they run and kept in torch's cache of compiled code.

    Each method gives what the function of its name gives in :mod:`preftune.modeling.kernels`, or None where its tensors are
    not for it: not bfloat16 on a CPU, not dense, or rows that are not whole vectors (a vocabulary may have any size).
    """

    def __init__(self) -> None:
        library = load("elementwise")
        with_eps = (ctypes.c_float,)
        self._rms = function(library.preftune_rms, 5, *with_eps)
        self._add_rms = function(library.preftune_add_rms, 7, *with_eps)
        self._rms_backward = function(library.preftune_rms_backward, 8)
        self._rotate = function(library.preftune_rotate, 4)
        self._rotate_backward = function(library.preftune_rotate_backward, 8)
        self._swiglu = function(library.preftune_swiglu, 3)
        self._swiglu_backward = function(library.preftune_swiglu_backward, 5)
        self._token_softmax = function(library.preftune_token_softmax, 4)

    def rms(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """x (T, d), weight (d,) -> normed (T, d), scale (T, 1)."""
        if not _are_rows(x, weight):
            return None
        normed, scale = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
        _call(self._rms, (x, weight, normed, scale), x.shape, eps)
        return normed, scale

    def add_rms(self, x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor] | None:
        """x and branch (T, d), weight (d,) -> their sum (T, d), normed (T, d), scale (T, 1)."""
        if not _are_rows(x, branch, weight):
            return None
        total, normed, scale = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
        _call(self._add_rms, (x, branch, weight, total, normed, scale), x.shape, eps)
        return total, normed, scale

    def rms_backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """grad, x, residual (T, d), scale (T, 1), weight (d,) -> gradient of x (T, d), normed (T, d)."""
        if not _are_rows(grad, x, weight, residual):
            return None
        dx, normed = torch.empty_like(x), torch.empty_like(x)
        _call(self._rms_backward, (grad, x, scale, weight, residual, dx, normed), x.shape)
        return dx, normed

    def rotate(self, heads: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
        """heads (T, H + K, D), turned where they stand, and values (T, K, D) behind them in memory -> (T, H + 2 K, D)."""
        rows, turned, width = heads.shape
        row = heads.stride(0)
        is_one = values.data_ptr() == heads.data_ptr() + 2 * turned * width and values.stride() == heads.stride() == (
            row,
            width,
            1,
        )
        if width % HALVES or not is_one or not _are_half(heads, values) or not _are_rows(cos, sin):
            return None
        _call(self._rotate, (heads, cos, sin), (rows, row, turned, width))
        return heads.as_strided((rows, turned + values.shape[1], width), (row, width, 1))

    def rotate_backward(self, dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
        """dq (T, H, D), dk and dv (T, K, D) -> (T, (H + 2 K) D)."""
        rows, heads, width = dq.shape
        kv_heads, parts = dk.shape[1], (dq, dk, dv)
        if width % HALVES or not _are_half(*parts) or any(one.stride(2) != 1 for one in parts) or not _are_rows(cos, sin):
            return None
        out = dq.new_empty(rows, (heads + 2 * kv_heads) * width)
        strides = integers([one.stride(axis) for one in parts for axis in (0, 1)])
        sizes = integers((rows, heads, kv_heads, width))
        self._rotate_backward(*(one.data_ptr() for one in (*parts, cos, sin, out)), sizes, strides)
        return out

    def swiglu(self, both: Tensor) -> Tensor | None:
        """both (T, 2 I) -> (T, I)."""
        if not _are_rows(both) or both.shape[1] % HALVES:
            return None
        act = both.new_empty(len(both), both.shape[1] // 2)
        _call(self._swiglu, (both, act), act.shape)
        return act

    def swiglu_backward(self, both: Tensor, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        """both (T, 2 I), grad (T, I) -> their gradient (T, 2 I), silu(gate) * up (T, I)."""
        if not _are_rows(both, grad):
            return None
        of_both, act = torch.empty_like(both), torch.empty_like(grad)
        _call(self._swiglu_backward, (both, grad, of_both, act), grad.shape)
        return of_both, act

    def token_softmax(self, logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor] | None:
        """logits (T, V), which become the probabilities, and ids (T, 1) -> those, and log p of the ids (T,), float32."""
        if not _are_half(logits) or not (logits.is_contiguous() and chosen.is_contiguous()):
            return None
        logps = logits.new_empty(len(logits), dtype=torch.float32)
        _call(self._token_softmax, (logits, chosen, logps), logits.shape)
        return logits, logps


def _are_half(*tensors: Tensor) -> bool:
    return all(one.dtype == torch.bfloat16 and one.device.type == "cpu" for one in tensors)


def _are_rows(*tensors: Tensor) -> bool:
    """Whether all are dense bfloat16 in whole vectors."""
    return _are_half(*tensors) and all(one.is_contiguous() and not one.shape[-1] % VECTOR for one in tensors)


def _call(kernel: Callable[..., Any], tensors: tuple[Tensor, ...], sizes: tuple[int, ...], *others: float) -> None:
    """Hand over the addresses of tensors, and sizes."""
    kernel(*(one.data_ptr() for one in tensors), integers(sizes), *others)

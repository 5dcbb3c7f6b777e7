"""Elementwise arithmetic of a transformer block, forward and backward by hand: eager, or compiled by torch.compile.

Every function here is pure and goes over memory once where it is compiled; eager it is the same arithmetic in more passes.
Sums and products are taken in float32 (float64 for float64 inputs) and rounded once, to the dtype of the input.

The same function runs with and without a graph, because the autograd Functions around it (:mod:`preftune.modeling.block`)
call it either way. So a reference that is scored without a graph has the bits of the policy, which torch.compile does not
promise of a function that it differentiates itself.

Symbols: T tokens, d width, H query heads, K key heads, D their width, I inner width, n tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from preftune.modeling.native_attention import NativeAttention
from preftune.modeling.native_low_rank import NativeLowRank

Pair: TypeAlias = tuple[Tensor, Tensor]


def wide(x: Tensor) -> Tensor:
    """x in the dtype that sums are taken in: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def rms(x: Tensor, weight: Tensor, eps: float) -> Pair:
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x (T, d), weight (d,) -> normed (T, d), scale 1 / sqrt(...) (T, 1) for backward.
    """
    high = wide(x)
    scale = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)
    return (high * scale * wide(weight)).to(x.dtype), scale


def add_rms(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + branch, rounded, and its RMSNorm: sum (T, d), normed (T, d), scale (T, 1)."""
    total = (wide(x) + wide(branch)).to(x.dtype)
    return (total, *rms(total, weight, eps))


def rms_backward(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor) -> Pair:
    """Gradient of x through RMSNorm plus that which reaches it past the norm, and the normed x once more.

    grad (T, d) of the normed x, residual (T, d) of x itself -> gradient of x (T, d), normed (T, d). With h = x scale and
    g = grad weight: scale (g - h mean(g h)).
    """
    high = wide(x) * scale
    pulled = wide(grad) * wide(weight)
    through = (pulled - high * (pulled * high).mean(-1, keepdim=True)) * scale
    return (through + wide(residual)).to(x.dtype), (high * wide(weight)).to(x.dtype)


def rotate(heads: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), halves as transformers pairs them; values are left behind them.

    heads (T, H + K, D) of queries and keys, values (T, K, D), cos and sin (T, D) -> (T, H + 2 K, D):
    a cos - b sin and b cos + a sin for the halves a, b of D.
    """
    half = heads.shape[-1] // 2
    a, b = wide(heads[..., :half]), wide(heads[..., half:])
    c, s = wide(cos)[:, None], wide(sin)[:, None]
    first = a * c[..., :half] - b * s[..., :half]
    turned = _side_by_side(first, b * c[..., half:] + a * s[..., half:], heads.dtype)
    return torch.cat((turned, values), 1)


def rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of rotated queries and keys turned back, with those of the values behind them: (T, (H + 2 K) D)."""
    grad = torch.cat((dq, dk), 1)
    half = grad.shape[-1] // 2
    a, b = wide(grad[..., :half]), wide(grad[..., half:])
    c, s = wide(cos)[:, None], wide(sin)[:, None]
    first = a * c[..., :half] + b * s[..., half:]
    turned = _side_by_side(first, b * c[..., half:] - a * s[..., :half], dq.dtype)
    return torch.cat((turned.flatten(1), dv.flatten(1)), 1)


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202): both (T, 2 I), gate before up -> (T, I)."""
    inner = both.shape[-1] // 2
    gate, up = wide(both[:, :inner]), wide(both[:, inner:])
    return (gate * torch.sigmoid(gate) * up).to(both.dtype)


def swiglu_backward(both: Tensor, grad: Tensor) -> Pair:
    """Gradient of gate and up (T, 2 I), and silu(gate) * up (T, I) once more."""
    inner = grad.shape[-1]  # not half of the other, which a compiler takes for another number, and so for other loops
    gate, up, high = wide(both[:, :inner]), wide(both[:, inner : 2 * inner]), wide(grad)
    open_ = torch.sigmoid(gate)
    silu = gate * open_
    d_gate = high * up * (open_ + silu * (1.0 - open_))
    return _side_by_side(d_gate, high * silu, both.dtype), (silu * up).to(both.dtype)


def _side_by_side(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a and b rounded, next to each other in the last axis; rounded afterwards, compiled code would write them twice."""
    return torch.cat((a.to(dtype), b.to(dtype)), -1)


def token_softmax(logits: Tensor, chosen: Tensor) -> Pair:
    """softmax of logits (T, V) in their dtype, and log p of the chosen ids (T, 1) -> (T,), float32."""
    high = wide(logits)
    top = high.amax(-1, keepdim=True)
    raised = torch.exp(high - top)
    total = raised.sum(-1, keepdim=True)
    return (raised / total).to(logits.dtype), (high.gather(1, chosen) - top - total.log()).squeeze(1)


@dataclass(frozen=True)
class Kernels:
    """The functions of this module as one set: as they stand (``EAGER``) or compiled (``compiled_kernels``)."""

    name: str
    rms: Callable[[Tensor, Tensor, float], Pair]
    add_rms: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    rms_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Pair]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    rotate_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor], Pair]
    token_softmax: Callable[[Tensor, Tensor], Pair] | None
    attention: NativeAttention | None = None
    low_rank: NativeLowRank | None = None


def _swiglu_by_torch(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return nn.functional.silu(gate).mul_(up)


def _swiglu_backward_by_torch(both: Tensor, grad: Tensor) -> Pair:
    gate, up = both.chunk(2, -1)
    silu, out = nn.functional.silu(gate), torch.empty_like(both)
    inner = both.shape[-1] // 2
    torch.mul(grad, silu, out=out[:, inner:])
    out[:, :inner] = torch.ops.aten.silu_backward(grad * up, gate)
    return out, silu.mul_(up)


EAGER = Kernels(
    "eager",
    rms,
    add_rms,
    rms_backward,
    rotate,
    rotate_backward,
    _swiglu_by_torch,
    _swiglu_backward_by_torch,
    None,
)
"""The same arithmetic where nothing is compiled: torch's own operators where they take fewer passes, as transformers does."""

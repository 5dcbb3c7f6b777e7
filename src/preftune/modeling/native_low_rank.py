"""Adapters of linear layers that read the same input by our own kernel (``native/low_rank.cpp``, which says how it works).

    inner_i = x A_i^T,    y_i += inner_i (s_i B_i)^T
    pulled_i = dy_i (s_i B_i),    dx += sum over i of pulled_i A_i
    dA_i = pulled_i^T x,    dB_i = s_i dy_i^T inner_i

Products of adapters are thin: a rank of 16 leaves a product of matrices little to do for what it reads. Here all adapters
of a side meet one run of rows while it is in the cache, factors are rounded on the way, and nothing is copied.

Symbols: T tokens, d inputs, o_i outputs, r_i ranks, R the ranks padded to whole vectors and summed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from preftune.modeling.native_code import VECTOR, function, integers, load

Sides: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor]]
COLUMNS = 2 * VECTOR
"""Inputs and outputs come in so many columns."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The adapters of one side: A_i (r_i, d) and B_i (o_i, r_i), float32, the first column of y_i in y, and s_i.

    width: columns of y, those of layers without an adapter too.
    """

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    columns: tuple[int, ...]
    scales: tuple[float, ...]
    width: int

    @property
    def num_ranks(self) -> int:
        """R."""
        return sum(-(-len(one) // VECTOR) * VECTOR for one in self.a)

    def sizes(self, num_tokens: int) -> list[int]:
        """As the kernel reads them."""
        found = [num_tokens, self.a[0].shape[1], self.width, len(self.a)]
        for a, b, column in zip(self.a, self.b, self.columns, strict=True):
            found += [column, len(b), len(a)]
        return found


class NativeLowRank:
    """The kernel, compiled where it runs and kept in torch's cache of compiled code.

    Threads take equal runs of rows, so the last bits of the gradients of factors depend on their number.
    """

    def __init__(self) -> None:
        library = load("low_rank")
        self._forward = function(library.preftune_low_rank_forward, 7)
        self._input = function(library.preftune_low_rank_input, 7)
        self._factors = function(library.preftune_low_rank_factors, 8)

    @staticmethod
    def takes(x: Tensor, factors: Factors) -> bool:
        """Whether these are for the kernel: x (T, d) bfloat16 on a CPU, float32 factors, d and every o_i in whole columns."""
        wide = (*factors.a, *factors.b)
        return (
            x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and x.is_contiguous()
            and all(one.dtype == torch.float32 and one.is_contiguous() for one in wide)
            and not x.shape[1] % COLUMNS
            and not any(len(one) % COLUMNS for one in factors.b)
            and not any(column % COLUMNS for column in factors.columns)
        )

    def forward(self, x: Tensor, y: Tensor, factors: Factors) -> Tensor:
        """Adds what the adapters give of x (T, d) to y (T, o); returns inner (T, R)."""
        inner = x.new_empty(len(x), factors.num_ranks)
        self._call(self._forward, (x, y, inner), (), factors, (factors.a, factors.b))
        return inner

    def input_grad(self, grad: Tensor, dx: Tensor | None, factors: Factors) -> Tensor:
        """Adds what comes back through the adapters to dx (T, d), where one is wanted; returns pulled (T, R)."""
        pulled = grad.new_empty(len(grad), factors.num_ranks)
        self._call(self._input, (grad, pulled), (dx,), factors, (factors.a, factors.b))
        return pulled

    def factor_grads(
        self, grad: Tensor, x: Tensor, inner: Tensor, pulled: Tensor, factors: Factors
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of every A_i and of every B_i, float32."""
        of_a, of_b = ([torch.empty_like(one) for one in side] for side in (factors.a, factors.b))
        self._call(self._factors, (grad, x, inner, pulled), (), factors, (of_a, of_b))
        return of_a, of_b

    @staticmethod
    def _call(
        kernel: Callable[..., None], rows: tuple[Tensor, ...], dx: tuple[Tensor | None, ...], factors: Factors, sides: Sides
    ) -> None:
        """Hand over the addresses of what has rows, and of the factors or their gradients."""
        a, b = (integers([one.data_ptr() for one in side]) for side in sides)
        scales = (ctypes.c_float * len(factors.scales))(*factors.scales)
        given = [None if one is None else one.data_ptr() for one in (rows[0], *dx, *rows[1:])]
        kernel(*given, a, b, scales, integers(factors.sizes(len(rows[0]))))

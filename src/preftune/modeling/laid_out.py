"""Frozen weights laid out once in the blocks that oneDNN multiplies from.

    x W^T  in forward,    g W  in backward

A product with a row-major W reorders W first, every time: in training on two cores that is a tenth of the products, and where
few tokens meet W, as in answering, half of them and more. A weight that does not train can be reordered once. It costs a copy
of W for each of the two products, so the caller decides whether there is room. In bfloat16 the same kernels multiply, so
the same bits come out; in float32 they are oneDNN's in place of those of torch's BLAS, and round otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

HINT_ROWS = 1024
"""Rows that the layout is chosen for; it multiplies any number of them."""


def base_linear(module: nn.Module) -> nn.Linear | None:
    """The linear layer itself, behind an adapter or not."""
    base = getattr(module, "base_layer", module)
    return base if type(base) is nn.Linear else None


@dataclass(frozen=True, slots=True)
class _Noted:
    """A layer as it was when its weight was laid out: version and address of the weight."""

    module: nn.Module
    version: int
    address: int

    @property
    def is_same(self) -> bool:
        """Whether the weight is still that one; merged adapters change it behind torch's back."""
        weight = cast(Tensor, getattr(self.module, "base_layer", self.module).weight)
        if weight.requires_grad or getattr(self.module, "merged", False):
            return False
        return weight._version == self.version and weight.data_ptr() == self.address  # noqa: SLF001 (torch's name for it)


@dataclass(frozen=True, slots=True)
class LaidOut:
    """One matrix W (o, d), of one linear layer or of several that read the same input, one below the other."""

    _across: Tensor
    _back: Tensor | None
    _noted: tuple[_Noted, ...]

    @property
    def is_current(self) -> bool:
        """Whether the weights are still those that were laid out; where not, they have to be multiplied as they stand."""
        return all(one.is_same for one in self._noted)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b: (T, d) -> (T, o)."""
        return _product(x, self._across, bias)

    def backward(self, grad: Tensor) -> Tensor:
        """grad W: (T, o) -> (T, d)."""
        assert self._back is not None, "laid out for forward alone"
        return _product(grad, self._back)


class LaidOutLinear(nn.Linear):
    """A linear layer whose forward takes its weight as it is laid out; made of a plain one by :func:`lay_out_layers`."""

    laid_out: LaidOut

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as torch names it)
        """x W^T + b: (..., d) -> (..., o)."""
        if not self.laid_out.is_current:
            return super().forward(input)
        flat = input.reshape(-1, input.shape[-1])
        return self.laid_out.forward(flat, self.bias).view(*input.shape[:-1], self.out_features)


@torch.no_grad()
def lay_out(modules: Sequence[nn.Module], *, is_forward_alone: bool = False) -> LaidOut | None:
    """Lay out the weights of linear layers of one input; None where one trains or is not what can be laid out."""
    bases = [base_linear(module) for module in modules]
    weights = [base.weight for base in bases if base is not None]
    if len(weights) != len(modules) or not all(map(can_be_laid_out, weights)):
        return None
    whole = weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
    noted = tuple(
        _Noted(module, weight._version, weight.data_ptr())  # noqa: SLF001 (torch's name for it)
        for module, weight in zip(modules, weights, strict=True)
    )
    return LaidOut(_reordered(whole), None if is_forward_alone else _reordered(whole.t().contiguous()), noted)


def lay_out_layers(model: nn.Module, most_bytes: float) -> int:
    """Give the linear layers of a frozen model their weights laid out for forward; the bytes it took.

    Nothing happens where they would take more than ``most_bytes``.
    """
    layers = [one for one in model.modules() if type(one) is nn.Linear and can_be_laid_out(one.weight)]
    wanted = sum(layer.weight.nbytes for layer in layers)
    if wanted > most_bytes:
        return 0
    for layer in layers:
        laid = lay_out([layer], is_forward_alone=True)
        layer.__class__ = LaidOutLinear
        cast(LaidOutLinear, layer).laid_out = cast(LaidOut, laid)
    return wanted


def can_be_laid_out(weight: Tensor) -> bool:
    """Whether this weight stays as it is, on a CPU whose torch was built with oneDNN, in float32 or in bfloat16."""
    if weight.requires_grad or weight.dim() != 2 or weight.device.type != "cpu":
        return False
    has_kernels = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return bool(has_kernels) and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()))


def _has_bfloat16() -> bool:
    return bool(cast(Any, torch.ops.mkldnn)._is_mkldnn_bf16_supported())  # noqa: SLF001 (as torch.compile asks it)


def _reordered(weight: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, HINT_ROWS))  # noqa: SLF001 (what torch.compile calls)


def _product(x: Tensor, laid: Tensor, bias: Tensor | None = None) -> Tensor:
    found = torch.ops.mkldnn._linear_pointwise(x, laid, bias, "none", [], "")  # noqa: SLF001 (what torch.compile calls)
    return cast(Tensor, found)

"""Frozen weights laid out once in the blocks that oneDNN multiplies from, for both of their products on a CPU.

    x W^T  in forward,    g W  in backward

oneDNN reorders W before every product of a row-major W: on two cores that is a tenth of the products of a step. A weight
that does not train can be reordered once. It costs a second and a third copy of W, so the caller decides whether there is
room. The same kernels multiply, so the same bits come out.
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
        base = base_linear(self.module)
        if base is None or base.weight.requires_grad or getattr(self.module, "merged", False):
            return False
        return base.weight._version == self.version and base.weight.data_ptr() == self.address  # noqa: SLF001 (torch's name for it)


@dataclass(frozen=True, slots=True)
class LaidOut:
    """One matrix W (o, d), of one linear layer or of several that read the same input, one below the other."""

    _across: Tensor
    _back: Tensor
    _noted: tuple[_Noted, ...]

    @property
    def is_current(self) -> bool:
        """Whether the weights are still those that were laid out; where not, they have to be multiplied as they stand."""
        return all(one.is_same for one in self._noted)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T: (T, d) -> (T, o)."""
        return _product(x, self._across)

    def backward(self, grad: Tensor) -> Tensor:
        """grad W: (T, o) -> (T, d)."""
        return _product(grad, self._back)


@torch.no_grad()
def lay_out(modules: Sequence[nn.Module]) -> LaidOut | None:
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
    return LaidOut(_reordered(whole), _reordered(whole.t().contiguous()), noted)


def can_be_laid_out(weight: Tensor) -> bool:
    """Whether this weight stays as it is, in bfloat16, on a CPU whose torch was built with oneDNN."""
    is_frozen = not weight.requires_grad and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    has_kernels = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return is_frozen and weight.dim() == 2 and has_kernels and _has_bfloat16()


def _has_bfloat16() -> bool:
    return bool(cast(Any, torch.ops.mkldnn)._is_mkldnn_bf16_supported())  # noqa: SLF001 (as torch.compile asks it)


def _reordered(weight: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, HINT_ROWS))  # noqa: SLF001 (what torch.compile calls)


def _product(x: Tensor, laid: Tensor) -> Tensor:
    found = torch.ops.mkldnn._linear_pointwise(x, laid, None, "none", [], "")  # noqa: SLF001 (what torch.compile calls)
    return cast(Tensor, found)

"""Linear layers that read the same input, as one product; adapters beside them.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T        i = 1 ... n, all of one x

W_1 ... W_n lie one below the other in memory (:func:`lay_together`), so that x meets them in one product, and so do the A_i
once they are cast. Adapters are float32 and are cast down, never the activations up. Backward forms no gradient of a
frozen weight and keeps nothing but x A^T.

Symbols: T tokens, d inputs, o_i outputs, r_i ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from preftune.modeling.adapters import LeanLoraLinear
from preftune.modeling.laid_out import LaidOut, base_linear
from preftune.modeling.native_low_rank import Factors, NativeLowRank

Tensors: TypeAlias = tuple[Tensor | None, ...]
PER_LAYER = 4  # weight, bias, A, B


@dataclass(frozen=True, slots=True)
class Side:
    """Linear layers of one input as a flat tuple of tensors (weight, bias, A, B of each) and their adapters' scales.

    laid: their weights laid out for products, where they are. native: our own kernel for adapters, where it is compiled.
    """

    tensors: Tensors
    scales: tuple[float, ...]
    laid: LaidOut | None = None
    native: NativeLowRank | None = None

    @property
    def num_layers(self) -> int:
        """How many linear layers."""
        return len(self.scales)

    def factors(self) -> Factors:
        """The adapters, for the kernel."""
        spans, adapted, _ = _places(self.tensors)
        a, b = (tuple(cast(Tensor, self.tensors[PER_LAYER * i + kind]) for i in adapted) for kind in (2, 3))
        columns, scales = tuple(spans[i].start for i in adapted), tuple(self.scales[i] for i in adapted)
        return Factors(a, b, columns, scales, spans[-1].stop)


def read_side(modules: Sequence[nn.Module]) -> Side | None:
    """The tensors of linear layers as they stand now; None where one is anything else, or drops values now."""
    tensors: list[Tensor | None] = []
    scales: list[float] = []
    for module in modules:
        read = _read(module)
        if read is None:
            return None
        tensors.extend(read[0])
        scales.append(read[1])
    return Side(tuple(tensors), tuple(scales))


def _read(module: nn.Module) -> tuple[Tensors, float] | None:
    if type(module) is nn.Linear:
        return (module.weight, module.bias, None, None), 0.0
    if type(module) is not LeanLoraLinear or type(module.base_layer) is not nn.Linear:
        return None
    base = module.base_layer
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not active:
        return (base.weight, base.bias, None, None), 0.0
    name = active[0]
    if len(active) > 1 or name in module.lora_variant or module.lora_bias[name]:
        return None
    drop = module.lora_dropout[name]
    if type(drop) is not nn.Identity and drop.training:
        return None
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return (base.weight, base.bias, cast(Tensor, a), cast(Tensor, b)), float(module.scaling[name])


@torch.no_grad()
def lay_together(modules: Sequence[nn.Module]) -> None:
    """Move the weights of linear layers one below the other into one block of memory; their values stay.

    Only where all have the same inputs, dtype and device. Parameters stay the same objects.
    """
    bases = [base_linear(module) for module in modules]
    weights = [base.weight for base in bases if base is not None]
    kinds = {(weight.shape[1], weight.dtype, weight.device) for weight in weights}
    if len(weights) != len(modules) or len(kinds) != 1 or together([weight.data for weight in weights]) is not None:
        return
    block = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, torch.split(block, [len(weight) for weight in weights]), strict=True):
        weight.data = part


def together(parts: Sequence[Tensor]) -> Tensor | None:
    """Matrices that lie one below the other, as one matrix on the same memory; None where they do not."""
    first = parts[0]
    if len(parts) == 1:
        return first
    width, at = first.shape[1], first.storage_offset()
    base = first.untyped_storage().data_ptr()
    for part in parts:
        is_next = part.storage_offset() == at and part.untyped_storage().data_ptr() == base
        if not (is_next and part.is_contiguous() and part.shape[1] == width):
            return None
        at += part.numel()
    return first.as_strided((sum(len(part) for part in parts), width), (width, 1))


def forward(x: Tensor, side: Side) -> tuple[Tensor, Tensor | None, Tensors]:
    """y (T, sum o_i); x A^T (T, sum r_i) or None; the cast adapters (A below each other, then every s_i B_i) for backward.

    Where the kernel does it, nothing is cast before, and the columns of x A^T are padded.
    """
    tensors = side.tensors
    weights, biases, a, b = (tensors[kind::PER_LAYER] for kind in range(PER_LAYER))
    spans, adapted, ranks = _places(tensors)
    whole = together([cast(Tensor, weight) for weight in weights]) if side.laid is None else None
    if side.laid is not None:
        y = side.laid.forward(x)
    elif whole is not None:
        y = torch.mm(x, whole.t())
    else:
        y = torch.cat([torch.mm(x, cast(Tensor, weight).t()) for weight in weights], 1)
    for bias, span in zip(biases, spans, strict=True):
        if bias is not None:
            y[:, span] += bias
    if not adapted:
        return y, None, ()
    if side.native is not None and side.native.takes(x, factors := side.factors()):
        return y, side.native.forward(x, y, factors), ()
    low_a = torch.cat([cast(Tensor, a[i]).to(x.dtype) for i in adapted])
    low_b = [(cast(Tensor, b[i]) * side.scales[i]).to(x.dtype) for i in adapted]
    inner = torch.mm(x, low_a.t())
    for i, low, rank in zip(adapted, low_b, ranks, strict=True):
        y[:, spans[i]].addmm_(inner[:, rank], low.t())
    return y, inner, (low_a, *low_b)


def input_grad(
    grad: Tensor, side: Side, inner: Tensor | None, low: Tensors, *, is_wanted: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of x: sum over i of grad_i W_i, and what comes back through adapters, (T, d); None where it is not wanted.

    With it the gradient at x A^T, which that of the adapters wants as well: grad_i (s_i B_i) side by side, (T, sum r_i); None
    without adapters.
    """
    dx = _through_weights(grad, side) if is_wanted else None
    if inner is None:
        return dx, None
    if not low:
        return dx, cast(NativeLowRank, side.native).input_grad(grad.contiguous(), dx, side.factors())
    pulled = _pull(grad, side.tensors, inner, low)
    return None if dx is None else dx.addmm_(pulled, cast(Tensor, low[0])), pulled


def _pull(grad: Tensor, tensors: Sequence[Tensor | None], inner: Tensor, low: Tensors) -> Tensor:
    """The gradient at x A^T."""
    spans, adapted, ranks = _places(tensors)
    if len(tensors) == PER_LAYER:
        return torch.mm(grad, cast(Tensor, low[1]))
    pulled = torch.empty_like(inner)
    for i, low_b, rank in zip(adapted, low[1:], ranks, strict=True):
        pulled[:, rank] = torch.mm(grad[:, spans[i]], cast(Tensor, low_b))
    return pulled


def _through_weights(grad: Tensor, side: Side) -> Tensor:
    """sum over i of grad_i W_i: (T, d)."""
    if side.laid is not None:
        return side.laid.backward(grad)
    weights = [cast(Tensor, weight) for weight in side.tensors[::PER_LAYER]]
    whole = together(weights)
    if whole is not None:
        return torch.mm(grad, whole)
    spans = _spans(weights)
    dx = torch.mm(grad[:, spans[0]], weights[0])
    for weight, span in zip(weights[1:], spans[1:], strict=True):
        dx.addmm_(grad[:, span], weight)
    return dx


def parameter_grads(
    grad: Tensor, x: Tensor, kept: tuple[Tensor | None, Tensors], pulled: Tensor | None, side: Side, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the tensors of a side that ``needs`` names, in their order; None for the others.

    grad (T, sum o_i), x (T, d); kept: x A^T and the cast adapters, as :func:`forward` gave them; pulled: the gradient at x A^T.
    """
    spans = _spans([cast(Tensor, weight) for weight in side.tensors[::PER_LAYER]])
    found: list[Tensor | None] = [None] * len(side.tensors)
    inner, low = kept
    if inner is not None and pulled is not None:
        factors = _factor_grads(grad, x, inner, pulled, side) if low else _native_factor_grads(grad, x, inner, pulled, side)
        _, adapted, _ = _places(side.tensors)
        for i, of_a, of_b in zip(adapted, *factors, strict=True):
            found[PER_LAYER * i + 2], found[PER_LAYER * i + 3] = of_a, of_b
    found[::PER_LAYER] = _weight_grads(grad, x, needs[::PER_LAYER], spans)
    for i, span in enumerate(spans):
        if needs[PER_LAYER * i + 1]:
            found[PER_LAYER * i + 1] = grad[:, span].sum(0)
    return found


def _factor_grads(grad: Tensor, x: Tensor, inner: Tensor, pulled: Tensor, side: Side) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of every A_i and every B_i."""
    spans, adapted, ranks = _places(side.tensors)
    whole = torch.mm(pulled.t(), x)
    of_a, of_b = [], []
    for i, rank in zip(adapted, ranks, strict=True):
        a, b = (cast(Tensor, side.tensors[PER_LAYER * i + kind]) for kind in (2, 3))
        of_a.append(whole[rank].to(a.dtype))
        # the narrow side first: on a CPU it takes two thirds of the time of grad^T inner
        turned = torch.mm(inner[:, rank].t(), grad[:, spans[i]]).t()
        of_b.append(turned.to(b.dtype, memory_format=torch.contiguous_format).mul_(side.scales[i]))
    return of_a, of_b


def _native_factor_grads(grad: Tensor, x: Tensor, inner: Tensor, pulled: Tensor, side: Side) -> tuple[list[Tensor], list[Tensor]]:
    native = cast(NativeLowRank, side.native)
    return native.factor_grads(grad.contiguous(), x.contiguous(), inner, pulled, side.factors())


def _places(tensors: Sequence[Tensor | None]) -> tuple[list[slice], list[int], list[slice]]:
    """Columns of each layer in y, which layers have an adapter, and the columns of those in x A^T."""
    a = tensors[2::PER_LAYER]
    adapted = [i for i, one in enumerate(a) if one is not None]
    spans = _spans([cast(Tensor, weight) for weight in tensors[::PER_LAYER]])
    return spans, adapted, _spans([cast(Tensor, a[i]) for i in adapted])


def _spans(parts: Sequence[Tensor]) -> list[slice]:
    """Rows of each matrix where they lie one below the other."""
    spans, at = [], 0
    for part in parts:
        spans.append(slice(at, at + len(part)))
        at += len(part)
    return spans


def _weight_grads(grad: Tensor, x: Tensor, needs: Sequence[bool], spans: Sequence[slice]) -> list[Tensor | None]:
    """grad_i^T x of every weight that wants it; one product where all do."""
    if all(needs):
        return list(torch.split(torch.mm(grad.t(), x), [span.stop - span.start for span in spans]))
    return [torch.mm(grad[:, span].t(), x) if is_needed else None for span, is_needed in zip(spans, needs, strict=True)]

"""Our own kernel for adapters beside the same products in float32, and when it is taken."""

from __future__ import annotations

import pytest
import torch
from native_machine import NEEDS_NATIVE, compiled
from torch import Tensor

from preftune.modeling import linears
from preftune.modeling.linears import Side
from preftune.modeling.native_low_rank import Factors, NativeLowRank

pytestmark = NEEDS_NATIVE


@pytest.fixture(scope="module")
def native() -> NativeLowRank:
    made = compiled().low_rank
    assert made is not None
    return made


def side_of(native: NativeLowRank | None, inputs: int, layers: list[tuple[int, int]]) -> Side:
    """Layers of (outputs, rank); rank 0: no adapter."""
    made = torch.Generator().manual_seed(0)
    tensors: list[Tensor | None] = []
    for outputs, rank in layers:
        weight = (torch.randn(outputs, inputs, generator=made) / inputs**0.5).bfloat16()
        a = torch.randn(rank, inputs, generator=made) / inputs**0.5 if rank else None
        b = torch.randn(outputs, rank, generator=made) if rank else None
        tensors += [weight, None, a, b]
    scales = tuple(0.5 + at if rank else 0.0 for at, (_, rank) in enumerate(layers))
    return Side(tuple(tensors), scales, native=native)


def passed(side: Side, x: Tensor, grad: Tensor, *, is_wanted: bool = True) -> dict[str, Tensor]:
    """y, dx, and the gradients of all factors."""
    y, inner, low = linears.forward(x, side)
    dx, pulled = linears.input_grad(grad, side, inner, low, is_wanted=is_wanted)
    found = linears.parameter_grads(grad, x, (inner, low), pulled, side, [False] * len(side.tensors))  # of no weight or bias
    named = {f"{'WbAB'[at % 4]}{at // 4}": one for at, one in enumerate(found) if one is not None}
    return {"y": y} | ({} if dx is None else {"dx": dx}) | named


def by_autograd(side: Side, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The same in float32, differentiated by torch."""
    wide = [None if one is None else one.float().requires_grad_(index % 4 > 1) for index, one in enumerate(side.tensors)]
    leaf = x.float().requires_grad_()
    parts = []
    for at, scale in enumerate(side.scales):
        weight, _, a, b = wide[4 * at : 4 * at + 4]
        assert weight is not None
        part = leaf @ weight.t()
        parts.append(part if a is None or b is None else part + scale * (leaf @ a.t() @ b.t()))
    y = torch.cat(parts, 1)
    y.backward(grad.float())  # type: ignore[no-untyped-call]
    found = {"y": y.detach(), "dx": leaf.grad}
    found |= {f"{'WbAB'[index % 4]}{index // 4}": one.grad for index, one in enumerate(wide) if one is not None}
    return {name: one for name, one in found.items() if one is not None}


LAYERS = [
    (64, [(96, 16), (32, 16), (32, 16)]),
    (96, [(64, 5)]),
    (32, [(64, 40), (128, 3)]),
    (64, [(32, 0), (64, 8), (32, 0)]),
    (64, [(32, 64), (32, 100)]),
]


@pytest.mark.parametrize(("inputs", "layers"), LAYERS)
@pytest.mark.parametrize("tokens", [1, 47, 97, 300])
def test_it_errs_no_more_than_torchs_products(
    native: NativeLowRank, inputs: int, layers: list[tuple[int, int]], tokens: int
) -> None:
    made = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, inputs, generator=made).bfloat16()
    grad = torch.randn(tokens, sum(outputs for outputs, _ in layers), generator=made).bfloat16()
    wanted = by_autograd(side_of(None, inputs, layers), x, grad)
    ours, theirs = (passed(side_of(one, inputs, layers), x, grad) for one in (native, None))
    assert ours.keys() == theirs.keys() == wanted.keys()
    for name, one in wanted.items():
        mine, other = (float((found[name].float() - one).norm() / one.norm()) for found in (ours, theirs))
        assert mine < 1.1 * other + 1e-4, name
        assert ours[name].dtype == theirs[name].dtype


def test_an_input_that_does_not_train_gets_no_gradient_and_changes_no_other(native: NativeLowRank) -> None:
    x, grad = torch.randn(50, 64).bfloat16(), torch.randn(50, 160).bfloat16()
    side = side_of(native, *LAYERS[0])
    whole, part = passed(side, x, grad), passed(side, x, grad, is_wanted=False)
    assert whole.keys() - part.keys() == {"dx"}
    assert all(torch.equal(one, whole[name]) for name, one in part.items())


def test_what_is_no_number_reaches_every_gradient(native: NativeLowRank) -> None:
    x, grad = torch.randn(50, 64).bfloat16(), torch.randn(50, 160).bfloat16()
    x[48, 3] = float("nan")
    found = passed(side_of(native, *LAYERS[0]), x, grad)
    assert found["y"].isnan().any(1).nonzero().tolist() == [[48]]
    assert all(found[f"A{at}"].isnan().any() and found[f"B{at}"].isnan().any() for at in range(3))


def test_only_what_it_can_is_given_to_it() -> None:
    def factors(inputs: int = 64, outputs: int = 32, *, column: int = 0, dtype: torch.dtype = torch.float32) -> Factors:
        a, b = torch.zeros(8, inputs, dtype=dtype), torch.zeros(outputs, 8, dtype=dtype)
        return Factors((a,), (b,), (column,), (1.0,), column + outputs)

    x = torch.zeros(5, 64, dtype=torch.bfloat16)
    assert NativeLowRank.takes(x, factors())
    assert not NativeLowRank.takes(x.float(), factors())
    assert not NativeLowRank.takes(x.t().contiguous().t(), factors())
    assert not NativeLowRank.takes(x[:, :48].contiguous(), factors(48))
    assert not NativeLowRank.takes(x, factors(outputs=40))
    assert not NativeLowRank.takes(x, factors(column=8))
    assert not NativeLowRank.takes(x, factors(dtype=torch.float64))

"""Our own kernel for attention: what it computes beside the written-out softmax in float32, and when it is taken."""

from __future__ import annotations

import itertools

import pytest
import torch
from native_machine import NEEDS_NATIVE, compiled
from torch import Tensor

from preftune.data.pack import Group
from preftune.modeling.attention import Asked, attend
from preftune.modeling.kernels import EAGER, Kernels
from preftune.modeling.layout import PairLayout
from preftune.modeling.native_attention import NativeAttention

pytestmark = NEEDS_NATIVE


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return compiled()


def groups_of(*shapes: tuple[int, tuple[int, ...]]) -> tuple[Group, ...]:
    starts = itertools.accumulate((prompt + sum(completions) for prompt, completions in shapes), initial=0)
    return tuple(Group(start, *shape) for start, shape in zip(starts, shapes, strict=False))


def tensors(groups: tuple[Group, ...], heads: int, kv_heads: int, width: int, out_width: int) -> list[Tensor]:
    """Queries, keys, values as a block hands them over, slices of one tensor, and the gradient of the outputs."""
    tokens = groups[-1].start + groups[-1].num_tokens
    made = torch.Generator().manual_seed(0)
    widest = max(width, out_width)
    lot = torch.randn(tokens, heads + 2 * kv_heads, widest, generator=made).bfloat16()
    parts = lot[:, :heads, :width], lot[:, heads : heads + kv_heads, :width], lot[:, heads + kv_heads :, :out_width]
    grad = torch.randn(1, tokens, heads, out_width, generator=made).bfloat16()
    return [*(part.transpose(0, 1)[None] for part in parts), grad]


def run(
    given: list[Tensor], groups: tuple[Group, ...], kernels: Kernels, *, window: int | None = None, wide: bool = False
) -> list[Tensor]:
    """Outputs and the gradients of q, k and v."""
    q, k, v, grad = (one.float() if wide else one for one in given)
    leaves = [one.detach().requires_grad_() for one in (q, k, v)]
    out = attend(torch.nn.Identity(), *leaves, PairLayout(groups, kernels=kernels), Asked(q.shape[3] ** -0.5, window))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((one.float() - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)]


SHAPES = [
    ((5, (3, 2)),),
    ((1, (1, 1)), (0, (4,)), (7, (9, 1, 30))),
    ((63, (65, 64)), (64, (1, 128)), (130, (7, 3)), (2, (300, 1))),
    ((3, (2, 2)), (1100, (70, 33))),  # beyond what the products take: flash attention in two parts otherwise
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "out_width"), [(9, 3, 64, 64), (2, 2, 16, 32), (4, 1, 80, 48), (3, 3, 128, 128)]
)
def test_it_is_the_softmax_in_float32_rounded_once_on_the_way(
    kernels: Kernels, shapes: tuple[tuple[int, tuple[int, ...]], ...], heads: int, kv_heads: int, width: int, out_width: int
) -> None:
    groups = groups_of(*shapes)
    given = tensors(groups, heads, kv_heads, width, out_width)
    wanted = run(given, groups, EAGER, wide=True)
    native, products = (errors(run(given, groups, one), wanted) for one in (kernels, EAGER))
    # probabilities and outputs have 8 bits: 2^-9 each at most, and the products of torch, which round more often, err no less
    assert max(native) < 2.0**-8 * 1.2
    assert all(ours < 1.1 * theirs + 1e-4 for ours, theirs in zip(native, products, strict=True)), (native, products)


def test_a_group_has_the_same_bits_in_any_pack_and_with_any_number_of_threads(kernels: Kernels) -> None:
    groups = groups_of((70, (40, 21)), (12, (130, 5)), (3, (2, 2)))
    given = tensors(groups, 9, 3, 64, 64)
    together = run(given, groups, kernels)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, run(given, groups, kernels), together))
    finally:
        torch.set_num_threads(before)
    for group in groups:
        span = slice(group.start, group.start + group.num_tokens)
        own = [*(one[:, :, span] for one in given[:3]), given[3][:, span]]
        alone = run(own, (Group(0, group.prompt, group.completions),), kernels)
        assert torch.equal(alone[0], together[0][:, span])
        assert all(torch.equal(one, other[:, :, span]) for one, other in zip(alone[1:], together[1:], strict=True))


def test_a_score_far_below_the_largest_counts_for_nothing(kernels: Kernels) -> None:
    groups = groups_of((2, (2, 1)))
    given = tensors(groups, 1, 1, 16, 16)
    given[0].fill_(8.0)
    given[1][0, 0] = torch.tensor([-9.0, 9.0, -9.0, -9.0, 9.0])[:, None].expand(5, 16)
    out = run(given, groups, kernels)[0][0, :, 0].float()
    values = given[2][0, 0].float()
    torch.testing.assert_close(out[1:4], values[1].expand(3, -1))
    torch.testing.assert_close(out[4], (values[1] + values[4]) / 2, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("broken", ["q", "k", "v"])
def test_what_is_no_number_reaches_the_output_and_the_gradients(kernels: Kernels, broken: str) -> None:
    groups = groups_of((6, (4, 3)))
    given = tensors(groups, 2, 1, 16, 16)
    given["qkv".index(broken)][0, 0, 2, 5] = float("nan")  # of the prompt: every later row sees it
    out, *grads = run(given, groups, kernels)
    is_broken = out[0, :, 0].isnan().any(-1)
    assert is_broken[slice(2, 3) if broken == "q" else slice(2, None)].all()
    if broken != "v":  # a probability of 0 times what is no number is none either
        assert not is_broken[:2].any()
    assert [bool(one.isnan().any()) for one in grads] == [True, True, broken != "v"]


def test_only_what_it_can_is_given_to_it(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = NativeAttention.forward
    monkeypatch.setattr(NativeAttention, "forward", lambda self, q, *rest: asked.append(q.shape[3]) or plain(self, q, *rest))
    groups = groups_of((6, (4, 3)))
    given = tensors(groups, 2, 1, 16, 16)
    wanted = run(given, groups, EAGER, wide=True)[0]
    for window in (None, 10):
        torch.testing.assert_close(run(given, groups, kernels, window=window)[0].float(), wanted, atol=0.02, rtol=0.02)
    assert asked == [16, 16]
    hidden = run(given, groups, EAGER, window=4)[0]
    assert torch.equal(run(given, groups, kernels, window=4)[0], hidden)
    assert torch.equal(run(given, groups, kernels, wide=True)[0], wanted)
    odd = tensors(groups, 2, 1, 24, 24)
    assert torch.equal(run(odd, groups, kernels)[0], run(odd, groups, EAGER)[0])
    assert asked == [16, 16]

"""The fused head against logits written out, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.modeling import head as head_module
from preftune.modeling.head import HeadSpec, head_spec, token_concentration, token_logps


def written_out(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: HeadSpec) -> Tensor:
    z = nn.functional.linear(hidden, weight, bias) * spec.scale
    if spec.cap is not None:
        z = spec.cap * torch.tanh(z / spec.cap)
    return torch.log_softmax(z, -1).gather(1, targets[:, None]).squeeze(1)


BLOCKED = [HeadSpec(block=4), HeadSpec(0.25, None, 4, block=3), HeadSpec(1.5, 3.0, block=11), HeadSpec(1.0, 2.0, block=64)]


@pytest.mark.parametrize(
    "spec", [HeadSpec(chunk=3), HeadSpec(0.25, None, 4), HeadSpec(1.0, 2.0, 5), HeadSpec(1.5, 3.0, 100), *BLOCKED]
)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_trained", [False, True])
def test_value_and_gradients_in_float64(
    monkeypatch: pytest.MonkeyPatch, spec: HeadSpec, has_bias: bool, is_trained: bool
) -> None:
    monkeypatch.setattr(head_module, "MIN_TOKENS", 5)  # several chunks of tokens, where the vocabulary comes in blocks too
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 20)
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=has_bias).double().requires_grad_(is_trained)
    targets = torch.randint(0, 11, (13,))
    upstream = torch.randn(13).double()
    results = []
    for run in (lambda h: token_logps(h, head, targets, spec), lambda h: written_out(h, head.weight, head.bias, targets, spec)):
        hidden = torch.linspace(-2, 2, 78).view(13, 6).double().requires_grad_()
        head.zero_grad()
        logps = run(hidden)
        torch.autograd.backward((logps * upstream).sum())
        results.append([logps.detach(), hidden.grad, *(one.grad for one in head.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_two_tokens_by_hand() -> None:
    # h = (1), W = (0, ln 3): z = (0, ln 3), p = (1/4, 3/4)
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [math.log(3.0)]])
    got = token_logps(torch.ones(2, 1), head, torch.tensor([0, 1]), HeadSpec())
    torch.testing.assert_close(got, torch.tensor([math.log(0.25), math.log(0.75)]))


def test_probabilities_below_the_smallest_float_keep_their_logarithm() -> None:
    # z = (0, -200): p of the second is e^-200, 0 in float32; its logarithm is -200
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [-200.0]])
    assert float(token_logps(torch.ones(1, 1), head, torch.tensor([1]), HeadSpec()).detach()) == -200.0


def test_evaluation_forms_no_gradient_and_the_same_numbers() -> None:
    head = nn.Linear(6, 11).requires_grad_(False)
    hidden, targets = torch.randn(9, 6, requires_grad=True), torch.randint(0, 11, (9,))
    with torch.no_grad():
        quiet = token_logps(hidden, head, targets, HeadSpec(chunk=4))
    assert not quiet.requires_grad
    assert torch.equal(quiet, token_logps(hidden, head, targets, HeadSpec(chunk=4)))


def test_sums_are_float32_for_a_bfloat16_head() -> None:
    torch.manual_seed(0)
    head = nn.Linear(32, 4096, bias=False).bfloat16()
    hidden, targets = torch.randn(64, 32).bfloat16(), torch.randint(0, 4096, (64,))
    logits = nn.functional.linear(hidden, head.weight)
    exact = torch.log_softmax(logits.double(), -1).gather(1, targets[:, None]).squeeze(1)
    ours = token_logps(hidden, head, targets, HeadSpec(chunk=16))
    low = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    assert ours.dtype == torch.float32
    assert float((low - exact).detach().abs().max()) > 1e-2  # with sums in bfloat16 the log-probs move
    assert float((ours - exact).detach().abs().max()) < 1e-5


def test_any_module_may_be_the_head() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2.0

    head = Scaled(6, 11)
    hidden, targets = torch.randn(7, 6, requires_grad=True), torch.randint(0, 11, (7,))
    expected = written_out(hidden, head.weight * 2, head.bias * 2, targets, HeadSpec())
    got = token_logps(hidden, head, targets, HeadSpec(chunk=3))
    torch.testing.assert_close(got, expected)
    (ours,) = torch.autograd.grad(got.sum(), hidden)
    (theirs,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("spec", [HeadSpec(chunk=3), HeadSpec(1.5, 3.0, 100)])
def test_concentration_is_the_log_of_the_sum_of_squares(spec: HeadSpec) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 11).double()
    hidden = torch.randn(13, 6).double() * 3
    z = nn.functional.linear(hidden, head.weight, head.bias) * spec.scale
    z = z if spec.cap is None else spec.cap * torch.tanh(z / spec.cap)
    expected = (torch.softmax(z, -1) ** 2).sum(-1).log()
    got = token_concentration(hidden, head, spec)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert not got.requires_grad
    even = token_concentration(torch.zeros(1, 6).double(), nn.Linear(6, 11, bias=False).double(), spec)
    assert even.item() == pytest.approx(-math.log(11))


def largest_bytes(vocabulary: int, *, is_trained: bool, block: int) -> int:
    """The largest tensor that the head makes beside its weight's own gradient."""
    head = nn.Linear(4, vocabulary, bias=False).requires_grad_(is_trained)
    hidden, targets = torch.randn(300, 4, requires_grad=True), torch.randint(0, vocabulary, (300,))
    # acc_events: without it torch 2.11 warns, even where there is one cycle, that events of an earlier one are cleared
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        torch.autograd.backward(token_logps(hidden, head, targets, HeadSpec(chunk=64, block=block)).sum())
    return max(event.cpu_memory_usage for event in found.events())


@pytest.mark.parametrize("is_trained", [False, True])
def test_blocks_make_memory_independent_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch, is_trained: bool) -> None:
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 1 << 16)
    small, large = (largest_bytes(size, is_trained=is_trained, block=1024) for size in (8192, 65536))
    weight = 65536 * 4 * 4 if is_trained else 0
    assert large <= max(1.2 * small, 1.05 * weight)
    off = largest_bytes(65536, is_trained=is_trained, block=0)
    assert off >= 64 * 65536 * 4, "all logits of a chunk at one time"


def test_only_large_vocabularies_come_in_blocks() -> None:
    def spec(vocabulary: int) -> HeadSpec:
        config = LlamaConfig(vocab_size=vocabulary, hidden_size=8, num_hidden_layers=0, num_attention_heads=1)
        with torch.device("meta"):
            return head_spec(LlamaForCausalLM(config))

    assert (spec(49_152).block, spec(151_936).block) == (0, 0)
    assert spec(262_144).block * spec(262_144).rows <= head_module.LOGITS_PER_CHUNK

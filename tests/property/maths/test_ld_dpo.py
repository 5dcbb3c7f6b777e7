"""LD-DPO: the tail of the longer completion counts alpha times, in policy and reference alike."""

import numpy as np
import pytest
import torch

from preftune.core.errors import UsageError
from preftune.maths.losses.base import losses
from preftune.maths.losses.ld_dpo import LDDPO
from preftune.maths.types import PairLogps, TokenLogps

# two pairs: tokens of the policy and of the reference, chosen and rejected
PAIRS = [
    (([-1.0, -2.0, -3.0], [-1.5, -2.5, -1.0]), ([-4.0], [-3.0])),
    (([-0.5, -1.5], [-0.5, -2.0]), ([-1.0, -1.0, -2.0, -6.0], [-1.5, -0.5, -3.0, -2.0])),
]


def side(pairs, at, grad, dtype):
    policy = torch.tensor([one for pair in pairs for one in pair[at][0]], dtype=dtype, requires_grad=grad)
    reference = torch.tensor([one for pair in pairs for one in pair[at][1]], dtype=dtype)
    counts = [len(pair[at][0]) for pair in pairs]
    segments = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(counts))
    places = torch.tensor([place for count in counts for place in range(count)])
    sums = (torch.tensor([sum(pair[at][which]) for pair in pairs], dtype=dtype) for which in (0, 1))
    return TokenLogps(policy, reference, segments, places), *sums, torch.tensor(counts)


def logps(pairs=PAIRS, grad=False, dtype=torch.float64, confidence=None):
    chosen, pc, rc, tc = side(pairs, 0, grad, dtype)
    rejected, pr, rr, tr = side(pairs, 1, grad, dtype)
    sure = None if confidence is None else torch.tensor(confidence, dtype=dtype)
    return PairLogps(pc, pr, rc, rr, tc, tr, confidence=sure, chosen=chosen, rejected=rejected)


def weights(count, shared, alpha):
    return np.array([1.0 if place < shared else alpha for place in range(count)])


def oracle(pair, beta, alpha, e):
    """The docstring in numpy: one pair, whole; with the gradient on every token of both sides."""
    (pc, rc), (pr, rr) = ((np.array(one), np.array(other)) for one, other in pair)
    shared = min(len(pc), len(pr))
    w, v = weights(len(pc), shared, alpha), weights(len(pr), shared, alpha)
    m = beta * ((w * (pc - rc)).sum() - (v * (pr - rr)).sum())
    slope = beta * (e - 1 / (1 + np.exp(m)))
    return (1 - e) * np.logaddexp(0, -m) + e * np.logaddexp(0, m), slope * w, -slope * v


def test_golden():
    # shared length 1: r_w = 0.5 + 0.5 (0.5 - 2.0) = -0.25, r_l = -1; m = 0.2 * 0.75 = 0.15
    # shared length 2: r_w = 0 + 0.5 = 0.5, r_l = 0.5 - 0.5 + 0.5 (1 - 4) = -1.5; m = 0.2 * 2 = 0.4
    out = LDDPO(beta=0.2, alpha=0.5)(logps())
    assert out.terms["ld_dpo"].values.tolist() == pytest.approx([np.log1p(np.exp(-0.15)), np.log1p(np.exp(-0.4))], abs=1e-12)
    assert out.chosen_rewards.tolist() == pytest.approx([-0.05, 0.1], abs=1e-12)
    assert out.rejected_rewards.tolist() == pytest.approx([-0.2, -0.3], abs=1e-12)


@pytest.mark.parametrize(("alpha", "e"), [(0.0, 0.0), (0.5, 0.0), (0.3, 0.2), (1.0, 0.1)])
def test_equals_numpy_and_the_gradient_by_hand(alpha, e):
    x = logps(grad=True)
    values = LDDPO(beta=0.3, alpha=alpha, label_smoothing=e)(x).terms["ld_dpo"].values
    values.sum().backward()
    expected = [oracle(pair, 0.3, alpha, e) for pair in PAIRS]
    np.testing.assert_allclose(values.detach().numpy(), [one[0] for one in expected], rtol=1e-12)
    np.testing.assert_allclose(x.chosen.policy.grad.numpy(), np.concatenate([one[1] for one in expected]), rtol=1e-12)
    np.testing.assert_allclose(x.rejected.policy.grad.numpy(), np.concatenate([one[2] for one in expected]), rtol=1e-12)


def test_confidences_are_smoothing_pair_by_pair():
    got = LDDPO(beta=0.3, label_smoothing=0.4)(logps(confidence=[0.8, 1.0])).terms["ld_dpo"].values.tolist()
    assert got == pytest.approx([oracle(PAIRS[0], 0.3, 0.5, 0.2)[0], oracle(PAIRS[1], 0.3, 0.5, 0.4)[0]], rel=1e-12)


def test_alpha_of_one_is_dpo_and_the_start_has_no_margin():
    x = logps()
    dpo = losses.build("dpo", {"beta": 0.3})(x)
    ld = LDDPO(beta=0.3, alpha=1.0)(x)
    torch.testing.assert_close(ld.terms["ld_dpo"].values, dpo.terms["dpo"].values)
    torch.testing.assert_close(ld.chosen_rewards, dpo.chosen_rewards)
    same = [tuple((reference, reference) for _, reference in pair) for pair in PAIRS]
    out = LDDPO(beta=0.3, alpha=0.2)(logps(same))
    assert torch.equal(out.chosen_rewards, out.rejected_rewards), "the reference is weighted as the policy is"


def test_equal_lengths_are_dpo_for_any_alpha():
    pairs = [(([-1.0, -2.0], [-1.5, -2.5]), ([-4.0, -1.0], [-3.0, -1.5]))]
    one, other = (LDDPO(alpha=alpha)(logps(pairs)).terms["ld_dpo"].values for alpha in (0.0, 1.0))
    assert torch.equal(one, other)


def test_micro_batches_and_swapping():
    loss = LDDPO(beta=0.3, alpha=0.4)
    whole = loss(logps()).terms["ld_dpo"].values
    assert [loss(logps([pair])).terms["ld_dpo"].values.item() for pair in PAIRS] == pytest.approx(whole.tolist(), rel=1e-12)
    swapped = loss(logps([pair[::-1] for pair in PAIRS])).terms["ld_dpo"].values
    out = loss(logps())
    torch.testing.assert_close(swapped - whole, out.chosen_rewards - out.rejected_rewards)  # L(-m) - L(m) = m


def test_float32_and_bfloat16():
    exact = LDDPO(beta=0.3, alpha=0.5)(logps()).terms["ld_dpo"].values
    for dtype, bits in ((torch.float32, 24), (torch.bfloat16, 8)):
        got = LDDPO(beta=0.3, alpha=0.5)(logps(dtype=dtype)).terms["ld_dpo"].values
        assert got.dtype == dtype
        # inputs are exact here; sums run in float64, then four operations round to `bits` bits
        assert ((got.double() - exact).abs() <= 8 * 2.0**-bits).all()


@pytest.mark.parametrize("bad", [{"beta": 0}, {"alpha": 1.1}, {"alpha": -0.1}, {"label_smoothing": 0.5}, {"gamma": 1}])
def test_bad_options_name_the_field(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        losses.build("ld_dpo", bad)


def test_single_tokens_are_asked_for():
    z, n = torch.zeros(1), torch.ones(1, dtype=torch.int)
    with pytest.raises(ValueError, match="single tokens"):
        LDDPO()(PairLogps(z, z, z, z, n, n))
    assert "tokens" in LDDPO().needs

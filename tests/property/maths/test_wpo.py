"""WPO: golden values, gradient, weights of the policy's own samples, micro-batches, oracle, precision; and mutants."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_rows import check_all, mutant, total

from preftune.core.errors import UsageError
from preftune.maths.losses import wpo as module
from preftune.maths.losses.base import losses
from preftune.maths.losses.wpo import WPO
from preftune.maths.types import PairLogps, TokenLogps

betas = st.floats(0.01, 1)
token = st.tuples(st.floats(-8, 0), st.floats(-8, 0), st.floats(-8, 0))  # policy, reference, log sum p^2
rows_of = st.lists(st.tuples(*[st.lists(token, min_size=1, max_size=4)] * 2), min_size=1, max_size=4)
ROWS = [
    ([(-1.0, -2.0, -0.5), (-0.5, -1.0, -1.5)], [(-3.0, -1.0, -2.0)]),
    ([(-0.2, -0.3, -0.4)], [(-0.9, -0.8, -0.7), (-1.1, -1.3, -0.6), (-2.0, -1.0, -0.1)]),
]


def side(rows, at, grad, dtype):
    """Sums under policy and reference, counts and single tokens of one side; the sums are made of the tokens."""
    values = torch.tensor([one for row in rows for one in row[at]], dtype=dtype)
    counts = torch.tensor([len(row[at]) for row in rows])
    owners = torch.repeat_interleave(torch.arange(len(rows)), counts)
    places = torch.cat([torch.arange(count) for count in counts])
    policy = values[:, 0].clone().requires_grad_(grad)
    tokens = TokenLogps(policy, values[:, 1], owners, places, values[:, 2])
    sums = [torch.zeros(len(rows), dtype=dtype).index_add(0, owners, one) for one in (policy, values[:, 1])]
    return (*sums, counts, tokens)


def logps(rows, grad=False, dtype=torch.float64):
    (pc, rc, tc, chosen), (pr, rr, tr, rejected) = (side(rows, at, grad, dtype) for at in (0, 1))
    return PairLogps(pc, pr, rc, rr, tc, tr, chosen=chosen, rejected=rejected)


def oracle(row, beta):
    """Eq. 2 one pair at a time in numpy: products of ratios, no logs."""
    weights = [np.prod([np.exp(p) / np.exp(c) for p, _, c in tokens]) ** (1 / len(tokens)) for tokens in row]
    ratio = [np.prod([np.exp(p) / np.exp(r) for p, r, _ in tokens]) for tokens in row]
    return weights[0] * weights[1] * np.log1p((ratio[0] / ratio[1]) ** -beta)


def check_golden(loss):
    # chosen: mean of -0.5 and 1.0 is 0.25; rejected: -1; weight e^-0.75. h = 1.5 - -2 = 3.5
    out = loss(beta=0.1)(logps(ROWS[:1]))
    assert out.terms["wpo"].values.item() == pytest.approx(math.exp(-0.75) * math.log1p(math.exp(-0.35)), abs=1e-12)
    assert out.terms["wpo"].unit == "pair"
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (pytest.approx(0.15), pytest.approx(-0.2))


def check_gradient(loss):
    x = logps(ROWS, grad=True)
    total(loss(beta=0.3), x).backward()
    weights = [math.exp(sum(np.mean([p - c for p, _, c in tokens]) for tokens in row)) for row in ROWS]
    h = (x.chosen_logratio - x.rejected_logratio).detach()
    slope = -torch.tensor(weights, dtype=torch.float64) * 0.3 * torch.sigmoid(-0.3 * h)
    torch.testing.assert_close(x.chosen.policy.grad, slope[x.chosen.segments])  # nothing through the weights
    torch.testing.assert_close(x.rejected.policy.grad, -slope[x.rejected.segments])


def check_micro_batches(loss):
    one = loss(beta=0.4)
    torch.testing.assert_close(total(one, logps(ROWS)), total(one, logps(ROWS[:1])) + total(one, logps(ROWS[1:])))


def check_oracle(loss):
    for beta in (0.1, 0.8):
        got = loss(beta=beta)(logps(ROWS)).terms["wpo"].values
        np.testing.assert_allclose(got.numpy(), [oracle(row, beta) for row in ROWS], rtol=1e-10)


CHECKS = (check_golden, check_gradient, check_micro_batches, check_oracle)
MUTANTS = {
    "gradient through the weights": ("(tokens.policy - tokens.concentration).detach()", "(tokens.policy - tokens.concentration)"),
    "no alignment": ("(tokens.policy - tokens.concentration)", "(tokens.policy)"),
    "alignment with the other sign": ("tokens.policy - tokens.concentration)", "tokens.policy + tokens.concentration)"),
    "weights of the reference": ("(tokens.policy - tokens", "(tokens.reference - tokens"),
    "sum and not mean": (".logps / num_tokens).exp()", ".logps).exp()"),
    "log weights": (".logps / num_tokens).exp()", ".logps / num_tokens)"),
    "chosen weight twice": ("_weight(logps.rejected, logps.rejected_tokens)", "_weight(logps.chosen, logps.chosen_tokens)"),
    "weights added": (") * _weight(", ") + _weight("),
    "flipped margin": ("chosen - rejected,", "rejected - chosen,"),
    "weights that add up to one": ("values = -weights", "values = -weights / weights.mean()"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_wpo(check):
    check(WPO)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    changed = mutant(module, "WPO", *MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(CHECKS, changed)


def test_completions_of_the_policys_own_weigh_about_one():
    """Tokens drawn from a policy against its own sum of squares: the expected probability of a draw is that sum."""
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(50, generator=generator, dtype=torch.float64) * 0.5, 0)
    drawn = torch.multinomial(p, 4000, replacement=True, generator=generator)
    ratio = p[drawn] / (p**2).sum()
    assert ratio.mean().item() == pytest.approx(1, abs=0.03)


@given(rows_of, betas)
def test_equal_weights_are_dpo(rows, beta):
    same = [tuple([(p, r, p) for p, r, _ in tokens] for tokens in row) for row in rows]  # certain of every token: weight 1
    x = logps(same)
    torch.testing.assert_close(WPO(beta=beta)(x).terms["wpo"].values, losses.build("dpo", {"beta": beta})(x).terms["dpo"].values)


def test_what_is_missing_is_said():
    x = logps(ROWS)
    for bare in (replace(x, chosen=None), replace(x, rejected=replace(x.rejected, concentration=None))):
        with pytest.raises(ValueError, match="no concentration"):
            WPO()(bare)


@pytest.mark.parametrize("bad", [{"beta": 0}, {"beta": "x"}, {"alpha": 1}])
def test_bad_options_name_the_field(bad):
    with pytest.raises(UsageError, match=f"'{next(iter(bad))}'"):
        losses.build("wpo", bad)


@given(rows_of, betas)
def test_float32(rows, beta):
    exact = WPO(beta=beta)(logps(rows)).terms["wpo"].values
    single = WPO(beta=beta)(logps(rows, dtype=torch.float32)).terms["wpo"].values
    # sums of 4 tokens of 8 nats keep 2^-19; the weight multiplies that error, and its own is of the same order
    assert ((single.double() - exact).abs() <= 1e-5 * (1 + exact)).all()

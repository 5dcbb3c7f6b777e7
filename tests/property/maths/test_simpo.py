"""SimPO: golden values, gradient, symmetries, micro-batches, precision; and mutants that all of this kills."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_rows import ROWS, check_all, logps, mutant, rows_of, total

from preftune.core.errors import UsageError
from preftune.maths.losses import simpo as module
from preftune.maths.losses.base import losses
from preftune.maths.losses.simpo import SimPO


def oracle(row, beta, gamma, e):
    pc, pr, _, _, tc, tr = (np.float64(value) for value in row)
    margin = beta * (pc / tc - pr / tr) - gamma
    return (1 - e) * np.logaddexp(0, -margin) + e * np.logaddexp(0, margin)


def check_golden(loss):
    # averages -10 / 4 = -2.5 and -20 / 5 = -4; 2 * 1.5 - 0.8 = 2.2; log(1 + e^-2.2)
    out = loss(beta=2.0, gamma=0.8)(logps(ROWS[:1]))
    assert out.terms["simpo"].values.item() == pytest.approx(math.log1p(math.exp(-2.2)), abs=1e-12)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (pytest.approx(-5.0), pytest.approx(-8.0))
    smooth = loss(beta=2.0, gamma=0.8, label_smoothing=0.1)(logps(ROWS[:1])).terms["simpo"].values.item()
    assert smooth == pytest.approx(0.9 * math.log1p(math.exp(-2.2)) + 0.1 * math.log1p(math.exp(2.2)), abs=1e-12)
    assert not loss.needs_reference


def check_gradient(loss):
    x = logps(ROWS, grad=True)
    total(loss(beta=2.5, gamma=0.7, label_smoothing=0.2), x).backward()
    chosen, rejected = x.policy_chosen.detach() / x.chosen_tokens, x.policy_rejected.detach() / x.rejected_tokens
    slope = 0.2 - torch.sigmoid(-(2.5 * (chosen - rejected) - 0.7))
    torch.testing.assert_close(x.policy_chosen.grad, 2.5 * slope / x.chosen_tokens)
    torch.testing.assert_close(x.policy_rejected.grad, -2.5 * slope / x.rejected_tokens)


def check_micro_batches(loss):
    torch.testing.assert_close(total(loss(), logps(ROWS)), total(loss(), logps(ROWS[:1])) + total(loss(), logps(ROWS[1:])))


def check_oracle(loss):
    for options in [(2.0, 1.0, 0.0), (10.0, 3.0, 0.3)]:
        beta, gamma, e = options
        got = loss(beta=beta, gamma=gamma, label_smoothing=e)(logps(ROWS)).terms["simpo"].values
        np.testing.assert_allclose(got.numpy(), [oracle(row, *options) for row in ROWS], rtol=1e-10)


CHECKS = (check_golden, check_gradient, check_micro_batches, check_oracle)
MUTANTS = {
    "flipped margin": ("m = chosen - rejected", "m = rejected - chosen"),
    "gamma before beta": ("- self.gamma", "- self.beta * self.gamma"),
    "gamma with the other sign": ("- self.gamma", "+ self.gamma"),
    "sum instead of average": ("logps.policy_chosen / logps.chosen_tokens", "logps.policy_chosen"),
    "length of the other side": ("logps.policy_rejected / logps.rejected_tokens", "logps.policy_rejected / logps.chosen_tokens"),
    "wrong smoothing sign": ("(1 - e) *", "(1 + e) *"),
    "early mean": ("- e * functional.logsigmoid(-m)", "- (e * functional.logsigmoid(-m)).mean()"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_simpo(check):
    check(SimPO)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    changed = mutant(module, "SimPO", *MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(CHECKS, changed)


@given(rows_of, st.floats(0, 3))
def test_the_reference_is_not_read(rows, gamma):
    moved = [(*row[:2], row[2] - 7, row[3] + 9, *row[4:]) for row in rows]
    one, other = (SimPO(gamma=gamma)(logps(some)).terms["simpo"].values for some in (rows, moved))
    assert torch.equal(one, other)


@given(rows_of)
def test_swapping_the_pair_without_a_target_gives_minus_the_margin(rows):
    swapped = [(c, a, f, d, n, m) for a, c, d, f, m, n in rows]
    out = SimPO(gamma=0.0)(logps(rows))
    gap = SimPO(gamma=0.0)(logps(swapped)).terms["simpo"].values - out.terms["simpo"].values
    torch.testing.assert_close(gap, out.chosen_rewards - out.rejected_rewards, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [{"beta": 0}, {"gamma": -1}, {"label_smoothing": 0.5}, {"length_normalised": True}])
def test_bad_options_name_the_field(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        losses.build("simpo", bad)


@given(rows_of, st.floats(0.5, 10))
def test_float32(rows, beta):
    exact = SimPO(beta=beta)(logps(rows)).terms["simpo"].values
    single = SimPO(beta=beta)(logps(rows, dtype=torch.float32)).terms["simpo"].values
    # two averages of at most 200 nats, each a few roundings of 2^-24 off, times beta
    assert (single.double() - exact).abs().max() <= beta * 4 * 200 * 2**-23 + 1e-5

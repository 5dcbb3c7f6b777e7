"""BCO on pairs: golden values, gradient, the running mean, micro-batches, oracle, precision; and mutants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_rows import ROWS, check_all, logps, mutant, rows_of, total

from preftune.core.errors import UsageError
from preftune.maths.losses import bco_pair as module
from preftune.maths.losses.base import StatefulLoss, losses
from preftune.maths.losses.bco_pair import BCOPair

betas = st.floats(0.01, 1)


def oracle(row, beta, shift):
    """The docstring's formula in plain numpy, one pair at a time."""
    pc, pr, rc, rr = (np.longdouble(value) for value in row[:4])
    return float(np.logaddexp(0, shift - beta * (pc - rc)) + np.logaddexp(0, beta * (pr - rr) - shift))


def check_golden(loss):
    # r_w = 0.1 * (-10 + 12) = 0.2, r_l = 0.1 * (-20 + 15) = -0.5; at d = 0.3: log(1 + e^0.1) + log(1 + e^-0.8)
    out = loss(beta=0.1).at({"mean": 0.3, "count": 9.0})(logps(ROWS[:1]))
    expected = math.log1p(math.exp(0.1)) + math.log1p(math.exp(-0.8))
    assert out.terms["bco"].values.item() == pytest.approx(expected, abs=1e-12)
    assert out.terms["bco"].unit == "pair"
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (pytest.approx(0.2), pytest.approx(-0.5))
    assert not out.chosen_rewards.requires_grad


def check_gradient(loss):
    x = logps(ROWS, grad=True)
    one = loss(beta=0.3)
    total(one.at(one.advance(one.initial_state(), x)), x).backward()
    w, r = 0.3 * x.chosen_logratio.detach(), 0.3 * x.rejected_logratio.detach()
    d = (w.sum() + r.sum()) / 6
    torch.testing.assert_close(x.policy_chosen.grad, -0.3 * torch.sigmoid(d - w))
    torch.testing.assert_close(x.policy_rejected.grad, 0.3 * torch.sigmoid(r - d))


def check_state(loss):
    # rewards at beta 0.1: 0.2 and -0.5, -0.1 and 0.7, -1.0 and 1.1; steps of one and of two pairs
    one = loss(beta=0.1)
    first = one.advance(one.initial_state(), logps(ROWS[:1]))
    assert first == {"mean": pytest.approx(-0.15), "count": 2.0}
    assert one.advance(first, logps(ROWS[1:])) == {"mean": pytest.approx(0.4 / 6), "count": 6.0}
    assert all(isinstance(value, float) for value in first.values()), "plain numbers go into the checkpoint"


def check_micro_batches(loss):
    one = loss(beta=0.2).at({"mean": -0.4, "count": 2.0})
    torch.testing.assert_close(total(one, logps(ROWS)), total(one, logps(ROWS[:1])) + total(one, logps(ROWS[1:])))


def check_oracle(loss):
    for beta, shift in [(0.1, 0.0), (0.5, 1.3), (0.9, -2.0)]:
        got = loss(beta=beta).at({"mean": shift, "count": 1.0})(logps(ROWS)).terms["bco"].values
        np.testing.assert_allclose(got.numpy(), [oracle(row, beta, shift) for row in ROWS], rtol=1e-10)


CHECKS = (check_golden, check_gradient, check_state, check_micro_batches, check_oracle)
MUTANTS = {
    "no shift": ("chosen - self.shift", "chosen"),
    "shift with the other sign": ("self.shift - rejected", "-self.shift - rejected"),
    "chosen and rejected swapped": ("e = chosen - self", "e = rejected - self"),
    "dropped reference": ("rewards = self.beta * (logps.chosen_logratio", "rewards = self.beta * (logps.policy_chosen"),
    "mean without beta": ("rewards = self.beta * (", "rewards = ("),
    "pairs counted as completions": ("2.0 * len(rewards)", "1.0 * len(rewards)"),
    "mean of means": ("(rewards.sum().item() - new * state[\"mean\"]) / count",
                      "(rewards.mean().item() / 2 - state[\"mean\"]) / 2"),
    "chosen rewards only": ("(logps.chosen_logratio + logps.rejected_logratio)", "(2 * logps.chosen_logratio)"),
    "early mean": ("functional.logsigmoid(down)", "functional.logsigmoid(down).mean()"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_bco_pair(check):
    check(BCOPair)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    changed = mutant(module, "BCOPair", *MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(CHECKS, changed)


@given(rows_of, betas, st.integers(1, 4))
def test_the_running_mean_is_that_of_all_rewards_however_they_come(rows, beta, k):
    loss = BCOPair(beta=beta)
    assert isinstance(loss, StatefulLoss)
    state = loss.initial_state()
    for at in range(0, len(rows), k):
        state = loss.advance(state, logps(rows[at : at + k]))
    whole = loss.advance(loss.initial_state(), logps(rows))
    assert state["count"] == whole["count"] == 2 * len(rows)
    assert state["mean"] == pytest.approx(whole["mean"], rel=1e-9, abs=1e-9)


@given(rows_of, betas, st.floats(-30, 30))
def test_a_common_shift_of_all_rewards_changes_nothing(rows, beta, shift):
    moved = [(a + shift, c + shift, *rest) for a, c, *rest in rows]
    loss = BCOPair(beta=beta)

    def value(x):
        return loss.at(loss.advance(loss.initial_state(), x))(x).terms["bco"].values

    torch.testing.assert_close(value(logps(rows)), value(logps(moved)), rtol=1e-8, atol=1e-9)


@given(rows_of, betas, st.floats(-2, 2))
def test_it_bounds_dpo_from_above(rows, beta, shift):
    """Theorem 1 of the paper, for any shift."""
    bco = BCOPair(beta=beta).at({"mean": shift, "count": 1.0})(logps(rows)).terms["bco"].values
    dpo = losses.build("dpo", {"beta": beta})(logps(rows)).terms["dpo"].values
    assert (bco >= dpo - 1e-9).all()


@pytest.mark.parametrize("bad", [{"beta": 0}, {"beta": "x"}, {"shift": 1.0}])
def test_bad_options_name_the_field(bad):
    with pytest.raises(UsageError, match=f"'{next(iter(bad))}'"):
        losses.build("bco_pair", bad)


@given(rows_of, betas)
def test_float32(rows, beta):
    loss = BCOPair(beta=beta).at({"mean": 0.1, "count": 1.0})
    exact = loss(logps(rows)).terms["bco"].values
    single = loss(logps(rows, dtype=torch.float32)).terms["bco"].values
    # four inputs up to 200 nats, each 2^-17 off at most, and a slope of at most beta on each
    assert (single.double() - exact).abs().max() <= beta * 4 * 2**-16 + 1e-4

"""IPO: golden values, gradient, symmetries, micro-batches, precision; and mutants that all of this kills."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_rows import ROWS, check_all, logps, mutant, rows_of, total

from preftune.core.errors import UsageError
from preftune.maths.losses import ipo as module
from preftune.maths.losses.base import losses
from preftune.maths.losses.ipo import IPO


def oracle(row, tau, is_normalised):
    pc, pr, rc, rr, tc, tr = (np.float64(value) for value in row)
    h = (pc - rc) / tc - (pr - rr) / tr if is_normalised else pc - rc - pr + rr
    return h**2 - h / tau + 1 / (4 * tau**2)  # the square, multiplied out


def check_golden(loss):
    # h = (-10 + 12) - (-20 + 15) = 7; target 1 / (2 * 0.1) = 5; (7 - 5)^2 = 4
    out = loss(tau=0.1)(logps(ROWS[:1]))
    assert out.terms["ipo"].values.item() == pytest.approx(4.0, abs=1e-12)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (pytest.approx(0.2), pytest.approx(-0.5))
    # by length: h = 2 / 4 + 5 / 5 = 1.5; (1.5 - 5)^2 = 12.25
    out = loss(tau=0.1, length_normalised=True)(logps(ROWS[:1]))
    assert out.terms["ipo"].values.item() == pytest.approx(12.25, abs=1e-12)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (pytest.approx(0.05), pytest.approx(-0.1))
    assert out.terms["ipo"].unit == "pair"
    assert not out.chosen_rewards.requires_grad


def check_gradient(loss):
    x = logps(ROWS, grad=True)
    total(loss(tau=0.3), x).backward()
    h = (x.chosen_logratio - x.rejected_logratio).detach()
    torch.testing.assert_close(x.policy_chosen.grad, 2 * (h - 1 / 0.6))
    torch.testing.assert_close(x.policy_rejected.grad, -2 * (h - 1 / 0.6))


def check_micro_batches(loss):
    torch.testing.assert_close(total(loss(), logps(ROWS)), total(loss(), logps(ROWS[:1])) + total(loss(), logps(ROWS[1:])))


def check_oracle(loss):
    for tau, is_normalised in [(0.1, False), (0.7, True)]:
        got = loss(tau=tau, length_normalised=is_normalised)(logps(ROWS)).terms["ipo"].values
        np.testing.assert_allclose(got.numpy(), [oracle(row, tau, is_normalised) for row in ROWS], rtol=1e-10)


CHECKS = (check_golden, check_gradient, check_micro_batches, check_oracle)
MUTANTS = {
    "flipped margin": ("h = chosen - rejected", "h = rejected - chosen"),
    "dropped reference": ("logps.chosen_logratio, logps.rejected_logratio", "logps.policy_chosen, logps.policy_rejected"),
    "target doubled": ("1 / (2 * self.tau)", "1 / self.tau"),
    "not squared": ("(h - target) ** 2", "(h - target).abs()"),
    "early mean": ("Term((1 - e) * (h - target) ** 2", "Term((1 - e) * ((h - target) ** 2).mean(0, keepdim=True)"),
    "length of the other side": ("rejected / logps.rejected_tokens", "rejected / logps.chosen_tokens"),
    "unscaled reward": ("self.tau * chosen.detach()", "chosen.detach()"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_ipo(check):
    check(IPO)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    changed = mutant(module, "IPO", *MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(CHECKS, changed)


@given(rows_of, st.floats(0.01, 1), st.floats(-50, 50))
def test_only_the_margin_matters(rows, tau, shift):
    moved = [(a + shift, c + shift, *rest) for a, c, *rest in rows]
    one, other = (IPO(tau=tau)(logps(some)).terms["ipo"].values for some in (rows, moved))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-6)


@given(rows_of, st.floats(0.01, 1))
def test_swapping_the_pair_adds_twice_h_over_tau(rows, tau):
    swapped = [(c, a, f, d, n, m) for a, c, d, f, m, n in rows]
    x = logps(rows)
    gap = IPO(tau=tau)(logps(swapped)).terms["ipo"].values - IPO(tau=tau)(x).terms["ipo"].values
    torch.testing.assert_close(gap, 2 * (x.chosen_logratio - x.rejected_logratio) / tau, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("bad", [{"tau": 0}, {"tau": "x"}, {"length_normalised": 3}, {"beta": 0.1}])
def test_bad_options_name_the_field(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        losses.build("ipo", bad)


@given(rows_of, st.floats(0.05, 1))
def test_float32(rows, tau):
    exact = IPO(tau=tau)(logps(rows)).terms["ipo"].values
    single = IPO(tau=tau)(logps(rows, dtype=torch.float32)).terms["ipo"].values
    # h is off by four roundings of 200 nats at 2^-24, and the square doubles that times its root
    assert (single.double() - exact).abs().max() <= (2 * exact.max().sqrt() + 1) * 4 * 200 * 2**-23 + 1e-6 * exact.max()

"""Rao-Kupper and Davidson: golden values, gradient, probabilities that add up, symmetry, oracle, precision; and mutants."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_rows import ROWS, check_all, mutant, rows_of, total
from pair_rows import logps as plain

from preftune.core.errors import UsageError
from preftune.maths.losses import davidson as davidson_module
from preftune.maths.losses import rao_kupper as rao_kupper_module
from preftune.maths.losses.base import losses
from preftune.maths.losses.davidson import Davidson
from preftune.maths.losses.rao_kupper import RaoKupper

betas = st.floats(0.01, 1)
KINDS = {"rao_kupper": (RaoKupper, rao_kupper_module), "davidson": (Davidson, davidson_module)}
TIES = [False, True, False]


def logps(rows, ties, **options):
    return replace(plain(rows, **options), is_tie=torch.tensor(ties))


def strengths(row, beta):
    """Strength e^reward of both completions, in long double."""
    pc, pr, rc, rr = (np.longdouble(value) for value in row[:4])
    return np.exp(beta * (pc - rc)), np.exp(beta * (pr - rr))


def chances(name, one, other, nu):
    """P(first wins), P(tie), P(second wins) as the two models are printed, by strengths."""
    if name == "rao_kupper":
        tie = (nu**2 - 1) * one * other / ((one + nu * other) * (other + nu * one))
        return one / (one + nu * other), tie, other / (other + nu * one)
    z = one + other + 2 * nu * np.sqrt(one * other)
    return one / z, 2 * nu * np.sqrt(one * other) / z, other / z


def oracle(name, row, is_tie, beta, nu):
    return float(-np.log(chances(name, *strengths(row, beta), nu)[1 if is_tie else 0]))


def checks_of(name):
    def check_golden(loss):
        # rewards of ROWS[0] at beta 0.1: 0.2 and -0.5, so d = 0.7
        win, tie = (loss(beta=0.1)(logps(ROWS[:1], [is_tie])).terms[name].values.item() for is_tie in (False, True))
        if name == "rao_kupper":  # nu 3: 1 / (1 + 3 e^-0.7), and 8 of that times 1 / (1 + 3 e^0.7)
            expected = (1 / (1 + 3 * math.exp(-0.7)), 8 / (1 + 3 * math.exp(-0.7)) / (1 + 3 * math.exp(0.7)))
        else:  # nu 1: Z = e^0.35 + e^-0.35 + 2
            z = math.exp(0.35) + math.exp(-0.35) + 2
            expected = (math.exp(0.35) / z, 2 / z)
        assert (math.exp(-win), math.exp(-tie)) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
        out = loss(beta=0.1)(logps(ROWS, TIES, grad=True))
        assert out.terms[name].unit == "pair"
        assert out.chosen_rewards.tolist() == pytest.approx([0.2, -0.1, -1.0])
        assert out.rejected_rewards.tolist() == pytest.approx([-0.5, 0.7, 1.1])
        assert not out.chosen_rewards.requires_grad

    def check_gradient(loss):
        x = logps(ROWS, TIES, grad=True)
        nu = 2.5
        total(loss(beta=0.3, nu=nu), x).backward()
        d = 0.3 * (x.chosen_logratio - x.rejected_logratio).detach()
        if name == "rao_kupper":
            low, high = torch.sigmoid(math.log(nu) - d), torch.sigmoid(d + math.log(nu))
            slope = torch.where(x.is_tie, high - low, -low)
        else:
            g = torch.sinh(d / 2) / (2 * torch.cosh(d / 2) + 2 * nu)
            slope = torch.where(x.is_tie, g, g - 0.5)
        torch.testing.assert_close(x.policy_chosen.grad, 0.3 * slope)
        torch.testing.assert_close(x.policy_rejected.grad, -0.3 * slope)

    def check_micro_batches(loss):
        one = loss(beta=0.2)
        parts = total(one, logps(ROWS[:1], TIES[:1])) + total(one, logps(ROWS[1:], TIES[1:]))
        torch.testing.assert_close(total(one, logps(ROWS, TIES)), parts)

    def check_oracle(loss):
        for beta, nu in [(0.1, 3.0), (0.5, 1.2), (0.05, 9.0)]:
            got = loss(beta=beta, nu=nu)(logps(ROWS, TIES)).terms[name].values
            expected = [oracle(name, row, is_tie, beta, nu) for row, is_tie in zip(ROWS, TIES, strict=True)]
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10)

    return check_golden, check_gradient, check_micro_batches, check_oracle


MUTANTS = {
    "rao_kupper": {
        "threshold with the other sign": ("logsigmoid(d - a)", "logsigmoid(d + a)"),
        "threshold of a tie on one side": ("logsigmoid(-d - a)", "logsigmoid(-d + a)"),
        "tie as a win": ("torch.where(logps.is_tie, tie, win)", "win"),
        "ties and wins swapped": ("is_tie, tie, win", "is_tie, win, tie"),
        "no constant": (" - math.log(self.nu**2 - 1)", ""),
        "nu for its log": ("math.log(self.nu)\n", "self.nu\n"),
        "flipped margin": ("chosen - rejected,", "rejected - chosen,"),
    },
    "davidson": {
        "whole margin": ("(chosen - rejected) / 2", "(chosen - rejected)"),
        "one nu": ("2 * self.nu", "self.nu"),
        "tie as a win": ("torch.where(logps.is_tie, tie, won)", "won"),
        "ties and wins swapped": ("is_tie, tie, won", "is_tie, won, tie"),
        "no ties in Z": ("[half, -half, tie]", "[half, -half]"),
        "flipped margin": ("(chosen - rejected) / 2", "(rejected - chosen) / 2"),
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_ties(name):
    check_all(checks_of(name), KINDS[name][0])


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in MUTANTS.items() for fault in faults])
def test_a_mutant_is_killed(name, fault):
    loss, module = KINDS[name]
    changed = mutant(module, loss.__name__, *MUTANTS[name][fault])
    with pytest.raises(AssertionError):
        check_all(checks_of(name), changed)


@pytest.mark.parametrize("name", KINDS)
@given(rows_of, betas, st.floats(1.01, 20))
def test_win_tie_and_loss_add_up_to_one(name, rows, beta, nu):
    loss = losses.build(name, {"beta": beta, "nu": nu})
    swapped = [(c, a, f, d, n, m) for a, c, d, f, m, n in rows]
    no, yes = [False] * len(rows), [True] * len(rows)
    views = (logps(rows, no), logps(rows, yes), logps(swapped, no))
    sums = sum((-loss(x).terms[name].values).exp() for x in views)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    back = loss(logps(swapped, yes)).terms[name].values
    torch.testing.assert_close(back, loss(views[1]).terms[name].values)  # a tie has no order


@pytest.mark.parametrize(("name", "nu"), [("rao_kupper", 1 + 1e-12), ("davidson", 1e-12)])
@given(rows_of, betas)
def test_without_ties_and_threshold_it_is_dpo(name, nu, rows, beta):
    got = losses.build(name, {"beta": beta, "nu": nu})(logps(rows, [False] * len(rows))).terms[name].values
    dpo = losses.build("dpo", {"beta": beta})(plain(rows)).terms["dpo"].values
    torch.testing.assert_close(got, dpo, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_extreme_margins_stay_finite(name):
    rows = [(0.0, -1e6, -1e6, 0.0, 3, 3), (-1e6, 0.0, 0.0, -1e6, 3, 3)]
    for ties in ([True, True], [False, False]):
        x = logps(rows, ties, grad=True, dtype=torch.float32)
        out = total(losses.build(name, {"beta": 1.0}), x)
        out.backward()
        assert torch.isfinite(out)
        assert torch.isfinite(x.policy_chosen.grad).all()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_missing_is_said(name):
    assert losses.factory(name).needs == {"ties", "confidence"}
    with pytest.raises(ValueError, match="which pairs are ties"):
        losses.build(name)(plain(ROWS))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bad", [{"beta": 0}, {"nu": 0}, {"nu": "x"}, {"tau": 1}])
def test_bad_options_name_the_field(name, bad):
    with pytest.raises(UsageError, match=f"'{next(iter(bad))}'"):
        losses.build(name, bad)


@pytest.mark.parametrize("name", KINDS)
@given(rows_of, betas)
def test_float32(name, rows, beta):
    loss = losses.build(name, {"beta": beta})
    ties = [at % 2 == 0 for at in range(len(rows))]
    exact = loss(logps(rows, ties)).terms[name].values
    single = loss(logps(rows, ties, dtype=torch.float32)).terms[name].values
    # four inputs up to 200 nats, each 2^-17 off at most; the slope on d is at most 1
    assert (single.double() - exact).abs().max() <= beta * 8 * 2**-16 + 1e-4

"""ORPO: golden values, gradient, symmetries, micro-batches, precision, both ends of log(1 - e^x); and mutants."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_rows import ROWS, check_all, logps, mutant, rows_of, total

from preftune.core.errors import UsageError
from preftune.maths.losses import orpo as module
from preftune.maths.losses.base import losses
from preftune.maths.losses.orpo import ORPO, log1mexp
from preftune.maths.types import SequenceLogps


def oracle(row, weight):
    """By probabilities and odds, not by their logarithms."""
    pc, pr, _, _, tc, tr = (np.longdouble(value) for value in row)
    p, q = np.exp(pc / tc), np.exp(pr / tr)
    ratio = (p / (1 - p)) / (q / (1 - q))
    return float(-pc / tc + weight * np.log(1 + 1 / ratio))


def check_golden(loss):
    # averages log(1/2) and log(1/4): odds 1 and 1/3, ratio 3, -log sigmoid(log 3) = log(4/3)
    x = logps([(4 * math.log(0.5), 5 * math.log(0.25), 0.0, 0.0, 4, 5)])
    out = loss(lambda_or=0.2)(x)
    assert out.terms["nll"].values.item() == pytest.approx(math.log(2), abs=1e-12)
    assert out.terms["odds_ratio"].values.item() == pytest.approx(math.log(4 / 3), abs=1e-12)
    assert total(loss(lambda_or=0.2), x).item() == pytest.approx(math.log(2) + 0.2 * math.log(4 / 3), abs=1e-12)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (
        pytest.approx(-0.2 * math.log(2)),
        pytest.approx(-0.2 * math.log(4)),
    )
    assert not loss.needs_reference


def check_gradient(loss):
    x = logps(ROWS, grad=True)
    total(loss(lambda_or=0.3), x).backward()
    p, q = (x.policy_chosen / x.chosen_tokens).detach().exp(), (x.policy_rejected / x.rejected_tokens).detach().exp()
    odds_ratio = p / (1 - p) / (q / (1 - q))
    delta = 1 / (1 + odds_ratio)  # sigmoid(-o), Eq. 8's first factor
    torch.testing.assert_close(x.policy_chosen.grad, (-1 - 0.3 * delta / (1 - p)) / x.chosen_tokens)
    torch.testing.assert_close(x.policy_rejected.grad, 0.3 * delta / (1 - q) / x.rejected_tokens)


def check_micro_batches(loss):
    torch.testing.assert_close(total(loss(), logps(ROWS)), total(loss(), logps(ROWS[:1])) + total(loss(), logps(ROWS[1:])))


def check_oracle(loss):
    for weight in (0.1, 1.5):
        got = [total(loss(lambda_or=weight), logps([row])).item() for row in ROWS]
        np.testing.assert_allclose(got, [oracle(row, weight) for row in ROWS], rtol=1e-10)


def check_scope(loss):
    # chosen -10 over 4 tokens, its prompt -14 over 8: 24 / 12
    x = replace(logps(ROWS[:1], grad=True), prompt=SequenceLogps(torch.tensor([-14.0]).double(), torch.tensor([8])))
    wide = loss(nll_scope="prompt_and_answer")
    assert wide.needs == {"prompt", "confidence"}
    assert wide(x).terms["nll"].values.item() == pytest.approx(2.0, abs=1e-12)
    assert loss()(x).terms["nll"].values.item() == pytest.approx(2.5, abs=1e-12)
    assert loss().needs == {"confidence"}
    with pytest.raises(ValueError, match="no log-probabilities of the prompts"):
        wide(logps(ROWS))


CHECKS = (check_golden, check_gradient, check_micro_batches, check_oracle, check_scope)
MUTANTS = {
    "flipped ratio": ("chosen - log1mexp(chosen) - (rejected - log1mexp(rejected))", "rejected - chosen"),
    "log-probabilities, not odds": ("chosen - log1mexp(chosen) - (rejected - log1mexp(rejected))", "chosen - rejected"),
    "unweighted": (', "pair", self.lambda_or)', ', "pair")'),
    "NLL of the sum": ("nll = -chosen", "nll = -logps.policy_chosen"),
    "NLL of the rejected": ("nll = -chosen", "nll = -rejected"),
    "prompt without its tokens": ("(logps.prompt.num_tokens + logps.chosen_tokens)", "logps.chosen_tokens"),
    "prompt alone": ("-(logps.prompt.logps + logps.policy_chosen)", "-logps.prompt.logps"),
    "length of the other side": ("logps.policy_rejected / logps.rejected_tokens", "logps.policy_rejected / logps.chosen_tokens"),
    "branches swapped": (
        "torch.where(is_near, (-torch.expm1(near)).log(), ",
        "torch.where(~is_near, (-torch.expm1(near)).log(), ",
    ),
    "early mean": ("Term(odds, ", "Term(odds.mean(0, keepdim=True), "),
}


@pytest.mark.parametrize("check", CHECKS)
def test_orpo(check):
    check(ORPO)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    changed = mutant(module, "ORPO", *MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(CHECKS, changed)


@given(rows_of)
def test_swapping_the_pair_negates_the_log_odds(rows):
    swapped = [(c, a, f, d, n, m) for a, c, d, f, m, n in rows]
    one, other = (ORPO()(logps(some)).terms["odds_ratio"].values for some in (rows, swapped))
    torch.testing.assert_close(torch.exp(-one) + torch.exp(-other), torch.ones_like(one))  # sigmoid(o) + sigmoid(-o) = 1


@given(rows_of)
def test_the_reference_is_not_read(rows):
    moved = [(*row[:2], row[2] - 7, row[3] + 9, *row[4:]) for row in rows]
    assert torch.equal(total(ORPO(), logps(rows)), total(ORPO(), logps(moved)))


@given(st.floats(-700, -1e-12))
def test_log1mexp_at_both_ends(x):
    expected = np.log1p(-np.exp(np.longdouble(x))) if x < -0.5 else np.log(-np.expm1(np.longdouble(x)))
    assert log1mexp(torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(float(expected), rel=1e-12, abs=1e-300)


def test_certain_and_impossible_completions_stay_finite():
    x = logps([(0.0, -1e5, 0.0, 0.0, 3, 3), (-1e5, 0.0, 0.0, 0.0, 3, 3), (-1e-9, -1e-9, 0.0, 0.0, 3, 3)], True, torch.float32)
    out = total(ORPO(), x)
    out.backward()
    assert torch.isfinite(out)
    assert torch.isfinite(x.policy_chosen.grad).all()
    assert torch.isfinite(x.policy_rejected.grad).all()


@pytest.mark.parametrize("bad", [{"lambda_or": 0}, {"lambda_or": "x"}, {"nll_scope": "all"}, {"beta": 0.1}])
def test_bad_options_name_the_field(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        losses.build("orpo", bad)


@given(rows_of)
def test_float32(rows):
    exact = total(ORPO(lambda_or=1.0), logps(rows))
    single = total(ORPO(lambda_or=1.0), logps(rows, dtype=torch.float32))
    # averages of at most 200 nats and at least 0.01 / 60: 1 - p is off by 2^-24 / (1 - p) in its logarithm
    assert abs(single.double() - exact) <= len(rows) * (6 * 200 * 2**-23 + 2**-23 / 1.6e-4)

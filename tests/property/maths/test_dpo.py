"""DPO: golden values, the paper's gradient, symmetries, micro-batches, precision; and six mutants that all of this kills."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.core.errors import UsageError
from preftune.maths.losses import dpo as module
from preftune.maths.losses.base import losses
from preftune.maths.losses.dpo import DPO
from preftune.maths.metrics import reduce_terms
from preftune.maths.types import PairLogps

nats = st.floats(-200, 0, allow_nan=False)
lengths = st.integers(1, 60)
rows_of = st.lists(st.tuples(nats, nats, nats, nats, lengths, lengths), min_size=1, max_size=8)
betas = st.floats(0.01, 1)
smoothings = st.floats(0, 0.49)
alphas = st.floats(0, 2)


def logps(rows, grad=False, dtype=torch.float64):
    """PairLogps of rows (policy chosen, policy rejected, reference chosen, reference rejected, tokens, tokens)."""
    t = torch.tensor([row[:4] for row in rows], dtype=dtype).T
    n = torch.tensor([row[4:] for row in rows], dtype=torch.int64).T
    return PairLogps(t[0].clone().requires_grad_(grad), t[1].clone().requires_grad_(grad), t[2], t[3], n[0], n[1])


def total(loss, x):
    """Sum of every term over the pairs: what the loop divides by the number of pairs."""
    return reduce_terms(loss(x), {"pair": 1})


def oracle(row, beta, e, is_normalised, alpha):
    """The docstring's formula in plain numpy, one pair at a time."""
    pc, pr, rc, rr, tc, tr = (np.float64(value) for value in row)
    h = (pc - rc) / (tc if is_normalised else 1) - (pr - rr) / (tr if is_normalised else 1)
    return (1 - e) * np.logaddexp(0, -beta * h) + e * np.logaddexp(0, beta * h) - alpha * pc / tc


# 1. golden values
def check_golden(loss):
    # h = (-10 - -12) - (-20 - -15) = 2 + 5 = 7; beta h = 0.7; L = log(1 + e^-0.7) = 0.4032
    x = logps([(-10.0, -20.0, -12.0, -15.0, 4, 5)])
    out = loss(beta=0.1)(x)
    assert out.terms["dpo"].values.item() == pytest.approx(math.log1p(math.exp(-0.7)), abs=1e-12)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (pytest.approx(0.2), pytest.approx(-0.5))
    # smoothing 0.1: 0.9 * 0.4032 + 0.1 * log(1 + e^0.7) = 0.9 * 0.40319 + 0.1 * 1.10319
    smooth = loss(beta=0.1, label_smoothing=0.1)(x).terms["dpo"].values.item()
    assert smooth == pytest.approx(0.9 * math.log1p(math.exp(-0.7)) + 0.1 * math.log1p(math.exp(0.7)), abs=1e-12)
    # by length: h = 2 / 4 - (-5) / 5 = 1.5; beta h = 7.5
    normalised = loss(beta=5.0, length_normalised=True)(x)
    assert normalised.terms["dpo"].values.item() == pytest.approx(math.log1p(math.exp(-7.5)), abs=1e-12)
    assert (normalised.chosen_rewards.item(), normalised.rejected_rewards.item()) == (pytest.approx(2.5), pytest.approx(-5.0))
    # rpo: 0.5 * 10 / 4 = 1.25 beside the DPO term
    assert loss(rpo_alpha=0.5)(x).terms["nll"].values.item() == pytest.approx(1.25, abs=1e-12)
    assert set(loss()(x).terms) == {"dpo"}
    # without a reference: h = -10 + 20 = 10; beta h = 1
    free = loss(beta=0.1, reference_free=True)
    assert not free.needs_reference
    assert loss().needs_reference
    assert free(x).terms["dpo"].values.item() == pytest.approx(math.log1p(math.exp(-1.0)), abs=1e-12)
    assert not out.chosen_rewards.requires_grad


# 2. the gradient is the paper's
def check_gradient(loss):
    rows = [(-10.0, -20.0, -12.0, -15.0, 4, 5), (-3.0, -1.0, -2.0, -8.0, 2, 9), (-50.0, -49.0, -40.0, -60.0, 30, 7)]
    for b, e, is_normalised, alpha in [(0.1, 0.0, False, 0.0), (0.3, 0.2, False, 0.0), (4.0, 0.1, True, 0.7)]:
        x = logps(rows, grad=True)
        total(loss(beta=b, label_smoothing=e, length_normalised=is_normalised, rpo_alpha=alpha), x).backward()
        n_c = x.chosen_tokens.double() if is_normalised else torch.ones(3, dtype=torch.float64)
        n_r = x.rejected_tokens.double() if is_normalised else torch.ones(3, dtype=torch.float64)
        h = ((x.policy_chosen - x.reference_chosen) / n_c - (x.policy_rejected - x.reference_rejected) / n_r).detach()
        slope = b * (e - torch.sigmoid(-b * h))  # dL/dh
        torch.testing.assert_close(x.policy_chosen.grad, slope / n_c - alpha / x.chosen_tokens)
        torch.testing.assert_close(x.policy_rejected.grad, -slope / n_r)


# 4. micro-batches add up
def check_micro_batches(loss):
    rows = [(-10.0, -20.0, -12.0, -15.0, 4, 5), (-3.0, -1.0, -2.0, -8.0, 2, 9), (-50.0, -49.0, -40.0, -60.0, 30, 7)]
    one = loss(label_smoothing=0.1, rpo_alpha=0.3)
    torch.testing.assert_close(total(one, logps(rows)), total(one, logps(rows[:1])) + total(one, logps(rows[1:])))


# 6. float64 against plain numpy
def check_oracle(loss):
    generator = np.random.default_rng(0)
    rows = [(*generator.uniform(-90, 0, 4), *generator.integers(1, 40, 2)) for _ in range(16)]
    for options in [(0.1, 0.0, False, 0.0), (0.5, 0.3, False, 0.2), (5.0, 0.1, True, 1.0)]:
        b, e, is_normalised, alpha = options
        out = loss(beta=b, label_smoothing=e, length_normalised=is_normalised, rpo_alpha=alpha)(logps(rows))
        got = sum(term.values for term in out.terms.values())
        np.testing.assert_allclose(got.numpy(), [oracle(row, *options) for row in rows], rtol=1e-10, atol=1e-10)


CHECKS = (check_golden, check_gradient, check_micro_batches, check_oracle)


def check_all(loss):
    for check in CHECKS:
        check(loss)


@pytest.mark.parametrize("check", CHECKS)
def test_dpo(check):
    check(DPO)


MUTANTS = {
    "flipped margin": ("chosen_rewards - rejected_rewards", "rejected_rewards - chosen_rewards"),
    "dropped reference": ("logps.chosen_logratio, logps.rejected_logratio", "logps.policy_chosen, logps.policy_rejected"),
    "wrong smoothing sign": ("(1 - e) *", "(1 + e) *"),
    "doubled term": ("-(1 - e) *", "-2 * (1 - e) *"),
    "unscaled reward": ("self.beta * chosen, self.beta * rejected", "chosen, rejected"),
    "early mean": ("- e * functional.logsigmoid(-margins)", "- (e * functional.logsigmoid(-margins)).mean()"),
    "length of the other side": ("rejected / logps.rejected_tokens", "rejected / logps.chosen_tokens"),
    "NLL without its length": ("logps.policy_chosen / logps.chosen_tokens", "logps.policy_chosen"),
    "the reference stays": ("chosen, rejected = logps.policy_chosen, logps.policy_rejected", "pass"),
    "NLL of the rejected": ("* logps.policy_chosen /", "* logps.policy_rejected /"),
}


def mutant(old, new):
    """The class with one place of its source changed."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in dpo.py"
    source = re.sub(r"^@losses.register.*$", "", source.replace(old, new), flags=re.MULTILINE)
    scope = {"__name__": module.__name__}
    exec(compile(source, "mutant", "exec"), scope)
    return scope["DPO"]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    changed = mutant(*MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(changed)


def test_the_unchanged_source_survives():
    check_all(mutant("margins = chosen_rewards", "margins = chosen_rewards"))


# 2 and 3, for any input
@given(rows_of, betas, smoothings)
def test_gradient_is_the_papers(rows, b, e):
    x = logps(rows, grad=True)
    total(DPO(beta=b, label_smoothing=e), x).backward()
    h = (x.chosen_logratio - x.rejected_logratio).detach()
    torch.testing.assert_close(x.policy_chosen.grad, b * (e - torch.sigmoid(-b * h)))
    torch.testing.assert_close(x.policy_rejected.grad, -b * (e - torch.sigmoid(-b * h)))


@given(rows_of, betas, st.floats(-50, 50))
def test_only_the_margin_matters(rows, b, shift):
    moved = [(a + shift, c + shift, *rest) for a, c, *rest in rows]
    torch.testing.assert_close(
        DPO(beta=b)(logps(rows)).terms["dpo"].values, DPO(beta=b)(logps(moved)).terms["dpo"].values, rtol=1e-9, atol=1e-9
    )


@given(rows_of, betas, smoothings)
def test_loss_of_the_swapped_pair_minus_the_loss_is_the_margin(rows, b, e):
    swapped = [(c, a, f, d, n, m) for a, c, d, f, m, n in rows]
    x = logps(rows)
    loss = DPO(beta=b, label_smoothing=e)
    gap = loss(logps(swapped)).terms["dpo"].values - loss(x).terms["dpo"].values
    torch.testing.assert_close(gap, (1 - 2 * e) * b * (x.chosen_logratio - x.rejected_logratio), rtol=1e-9, atol=1e-9)


@given(rows_of)
def test_equal_lengths_only_rescale_beta(rows):
    same = [(*row[:4], 8, 8) for row in rows]
    torch.testing.assert_close(
        DPO(beta=0.8, length_normalised=True)(logps(same)).terms["dpo"].values, DPO(beta=0.1)(logps(same)).terms["dpo"].values
    )


# 4
@given(rows_of, st.integers(1, 4), alphas)
def test_micro_batches_add_up(rows, k, alpha):
    loss = DPO(rpo_alpha=alpha)
    parts = sum(total(loss, logps(rows[i : i + k])) for i in range(0, len(rows), k))
    torch.testing.assert_close(total(loss, logps(rows)), parts)


# 5
@pytest.mark.parametrize(
    "bad",
    [
        {"beta": 0},
        {"beta": -1},
        {"beta": "x"},
        {"label_smoothing": 0.5},
        {"label_smoothing": -0.1},
        {"rpo_alpha": -1},
        {"length_normalised": 3},
        {"betta": 0.1},
    ],
)
def test_bad_options_name_the_field(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        losses.build("dpo", bad)


def test_a_typo_in_the_name_gets_the_right_one():
    with pytest.raises(UsageError, match="did you mean 'dpo'"):
        losses.build("dppo")


# 6, for any input
@given(rows_of, betas, smoothings, st.booleans(), alphas)
def test_equals_plain_numpy(rows, b, e, is_normalised, alpha):
    out = DPO(beta=b, label_smoothing=e, length_normalised=is_normalised, rpo_alpha=alpha)(logps(rows))
    got = sum(term.values for term in out.terms.values())
    np.testing.assert_allclose(got.numpy(), [oracle(row, b, e, is_normalised, alpha) for row in rows], rtol=1e-9, atol=1e-9)


# 7. precision: the loss adds no error of its own; what bfloat16 costs is the rounding of its inputs
@given(rows_of, betas)
def test_float32_and_bfloat16(rows, b):
    exact = DPO(beta=b)(logps(rows)).terms["dpo"].values
    # float32 keeps 24 bits: four inputs up to 200 nats, each 2^-17 off at most, times beta <= 1
    single = DPO(beta=b)(logps(rows, dtype=torch.float32)).terms["dpo"].values
    assert (single.double() - exact).abs().max() <= b * 4 * 2**-16 + 1e-5
    # bfloat16 keeps 8 bits: an input of 200 nats is half a nat off, a difference rounds again. This is why the forward
    # returns float32 log-probabilities; the bound here is 7 roundings of 200 nats at 2^-8, and of the loss itself.
    half = DPO(beta=b)(logps(rows, dtype=torch.bfloat16)).terms["dpo"].values
    assert (half.double() - exact).abs().max() <= 7 * b * 400 * 2**-8 + 2**-7 * (exact.max() + 1)


def test_extreme_margins_stay_finite():
    x = logps([(0.0, -1e6, -1e6, 0.0, 3, 3), (-1e6, 0.0, 0.0, -1e6, 3, 3)], grad=True, dtype=torch.float32)
    out = total(DPO(beta=1.0), x)
    out.backward()
    assert torch.isfinite(out)
    assert torch.isfinite(x.policy_chosen.grad).all()


def test_a_wrong_shape_is_refused_in_tests():
    z = torch.zeros(3)
    with pytest.raises(Exception, match=r"(?i)type-check"):
        PairLogps(z, z, z, torch.zeros(4), z.int(), z.int())

"""KTO: golden values, gradient, the reference point, weights, micro-batches, precision; and mutants that all of this kills."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_rows import check_all, mutant, total

from preftune.core.errors import UsageError
from preftune.maths.losses import kto as module
from preftune.maths.losses.base import DataAwareLoss, losses
from preftune.maths.losses.kto import KTO
from preftune.maths.types import UnpairedLogps

nats = st.floats(-200, 0, allow_nan=False)
rows_of = st.lists(st.tuples(nats, nats, st.booleans()), min_size=1, max_size=8)
ROWS = [(-10.0, -12.0, True), (-30.0, -25.0, True), (-8.0, -9.0, False), (-40.0, -20.0, False)]
PARTNERS = [(-30.0, -33.0), (-12.0, -13.0)]  # log-ratios 3 and 1: z0 = 2


def logps(rows, partners=PARTNERS, grad=False, dtype=torch.float64):
    policy, reference = (torch.tensor([row[at] for row in rows], dtype=dtype) for at in (0, 1))
    mismatched = torch.tensor(partners, dtype=dtype).reshape(-1, 2).T
    return UnpairedLogps(
        policy.requires_grad_(grad),
        reference,
        torch.ones(len(rows), dtype=torch.int64),
        torch.tensor([row[2] for row in rows]),
        mismatched[0].clone().requires_grad_(grad),
        mismatched[1],
    )


def oracle(row, partners, beta, d, u):
    """The paper's lambda - v, by exp."""
    r = np.longdouble(row[0]) - np.longdouble(row[1])
    z0 = max(0.0, float(np.mean([p - q for p, q in partners])))
    if row[2]:
        return float(d - d / (1 + np.exp(-beta * (r - z0))))
    return float(u - u / (1 + np.exp(-beta * (z0 - r))))


def check_golden(loss):
    # r = 2, z0 = 2: a desirable completion at the reference point costs half its weight; r = 1 undesirable: 1 - s(0.1)
    out = loss(beta=0.1, lambda_d=1.5, lambda_u=0.8)(logps([ROWS[0], ROWS[2]]))
    values = out.terms["kto"].values
    assert values[0].item() == pytest.approx(0.75, abs=1e-12)
    assert values[1].item() == pytest.approx(0.8 / (1 + math.exp(0.1)), abs=1e-12)
    assert out.chosen_rewards.tolist() == [pytest.approx(0.2)]
    assert out.rejected_rewards.tolist() == [pytest.approx(0.1)]
    assert out.terms["kto"].unit == "completion"
    # a negative mean log-ratio of the partners counts as 0: then r = 2 gives 1 - s(0.2)
    low = loss(beta=0.1)(logps(ROWS[:1], [(-50.0, -20.0)])).terms["kto"].values
    assert low.item() == pytest.approx(1 / (1 + math.exp(0.2)), abs=1e-12)


def check_gradient(loss):
    x = logps(ROWS, grad=True)
    total(loss(beta=0.2, lambda_d=1.3, lambda_u=0.9), x).backward()
    r = x.logratio.detach()
    s = torch.sigmoid(0.2 * torch.where(x.is_desirable, r - 2, 2 - r))
    expected = torch.where(x.is_desirable, -1.3, 0.9) * 0.2 * s * (1 - s)
    torch.testing.assert_close(x.policy.grad, expected)
    assert x.mismatched_policy.grad is None, "the reference point has no gradient"


def check_micro_batches(loss):
    one = loss(lambda_d=1.2)
    torch.testing.assert_close(total(one, logps(ROWS)), total(one, logps(ROWS[:1])) + total(one, logps(ROWS[1:])))


def check_oracle(loss):
    for options in [(0.1, 1.0, 1.0), (0.5, 1.33, 0.7)]:
        beta, d, u = options
        for partners in (PARTNERS, [(-50.0, -20.0), (-1.0, -2.0)]):
            got = loss(beta=beta, lambda_d=d, lambda_u=u)(logps(ROWS, partners)).terms["kto"].values
            np.testing.assert_allclose(got.numpy(), [oracle(row, partners, *options) for row in ROWS], rtol=1e-10)


CHECKS = (check_golden, check_gradient, check_micro_batches, check_oracle)
MUTANTS = {
    "labels swapped": ("logps.logratio - z0, z0 - logps.logratio", "z0 - logps.logratio, logps.logratio - z0"),
    "weights swapped": ("desirable, desired, undesired", "desirable, undesired, desired"),
    "no clamp": (".mean().clamp(min=0)", ".mean()"),
    "sum of the partners": (".mean().clamp(min=0)", ".sum().clamp(min=0)"),
    "gradient through the reference point": (").detach().mean()", ").mean()"),
    "no beta": ("torch.sigmoid(-self.beta * gain)", "torch.sigmoid(-gain)"),
    "no reference point": ("logps.logratio - z0, z0 - logps.logratio", "logps.logratio, -logps.logratio"),
    "log of the sigmoid": ("torch.sigmoid(-self.beta * gain)", "-torch.nn.functional.logsigmoid(self.beta * gain)"),
    "early mean": ("Term(weight *", "Term(weight.mean() *"),
    "rewards swapped": ("rewards[desirable], rewards[~desirable]", "rewards[~desirable], rewards[desirable]"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_kto(check):
    check(KTO)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    changed = mutant(module, "KTO", *MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(CHECKS, changed)


@given(rows_of, st.floats(0.01, 1), st.floats(0, 40))
def test_a_common_shift_of_all_log_ratios_above_zero_changes_nothing(rows, beta, shift):
    moved = [(a + shift, b, label) for a, b, label in rows]
    partners = [(a + shift, b) for a, b in PARTNERS]
    one, other = KTO(beta=beta)(logps(rows)), KTO(beta=beta)(logps(moved, partners))
    torch.testing.assert_close(one.terms["kto"].values, other.terms["kto"].values, rtol=1e-8, atol=1e-9)


@given(rows_of, st.floats(0.01, 1))
def test_the_other_label_costs_what_is_left_of_the_weight(rows, beta):
    other = [(a, b, not label) for a, b, label in rows]
    both = sum(KTO(beta=beta)(logps(some)).terms["kto"].values for some in (rows, other))
    torch.testing.assert_close(both, torch.ones_like(both))


@pytest.mark.parametrize(
    ("d", "u", "counts", "expected"),
    [
        ("auto", "auto", (50, 200), (4.0, 1.0)),
        ("auto", "auto", (200, 50), (1.0, 4.0)),
        ("auto", 2.0, (100, 50), (1.0, 2.0)),
        (1.5, "auto", (100, 50), (1.5, 3.0)),
        ("auto", "auto", (0, 9), (1.0, 1.0)),
        (1.0, 3.0, (100, 50), (1.0, 3.0)),
    ],
)
def test_auto_weights_balance_the_labels(d, u, counts, expected):
    assert isinstance(KTO(), DataAwareLoss)
    fitted = KTO(lambda_d=d, lambda_u=u).fitted(*counts)
    assert (fitted.lambda_d, fitted.lambda_u) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    if all(counts) and "auto" in (d, u):
        assert fitted.doubt(*counts) == ""


def test_weights_outside_the_papers_range_are_doubted():
    assert KTO(lambda_d=4 / 3).doubt(100, 100) == ""
    assert "1.4" in KTO(lambda_d=1.4).doubt(100, 100)
    assert "outside the 1 to 4/3" in KTO().doubt(99, 100)
    assert "no completion is undesirable" in KTO().doubt(5, 0)


def test_what_is_missing_is_said():
    x = logps(ROWS)
    bare = UnpairedLogps(x.policy, x.reference, x.num_tokens, x.is_desirable)
    with pytest.raises(ValueError, match="no mismatched completions"):
        KTO()(bare)
    with pytest.raises(ValueError, match="call fitted"):
        KTO(lambda_u="auto")(x)


@pytest.mark.parametrize("bad", [{"beta": 0}, {"lambda_d": 0}, {"lambda_u": -1}, {"lambda_u": "automatic"}, {"tau": 1}])
def test_bad_options_name_the_field(bad):
    with pytest.raises(UsageError, match=f"'{next(iter(bad))}'"):
        losses.build("kto", bad)


@given(rows_of, st.floats(0.01, 1))
def test_float32(rows, beta):
    exact = KTO(beta=beta)(logps(rows)).terms["kto"].values
    single = KTO(beta=beta)(logps(rows, dtype=torch.float32)).terms["kto"].values
    # the slope is at most beta / 4, on a log-ratio that is a few roundings of 200 nats at 2^-24 off
    assert (single.double() - exact).abs().max() <= beta * 200 * 2**-23 + 1e-6

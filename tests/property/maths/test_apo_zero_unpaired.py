"""APO-zero on single completions: golden values, gradient, labels, weights, oracle, precision; and mutants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_rows import check_all, mutant, total

from preftune.core.errors import UsageError
from preftune.maths.losses import apo_zero_unpaired as module
from preftune.maths.losses.apo_zero_unpaired import APOZeroUnpaired
from preftune.maths.losses.base import DataAwareLoss, losses
from preftune.maths.types import UnpairedLogps

nats = st.floats(-200, 0, allow_nan=False)
rows_of = st.lists(st.tuples(nats, nats, st.booleans()), min_size=1, max_size=8)
ROWS = [(-10.0, -12.0, True), (-30.0, -25.0, True), (-8.0, -9.0, False), (-40.0, -20.0, False)]


def logps(rows, grad=False, dtype=torch.float64):
    policy, reference = (torch.tensor([row[at] for row in rows], dtype=dtype) for at in (0, 1))
    labels = torch.tensor([row[2] for row in rows])
    return UnpairedLogps(policy.requires_grad_(grad), reference, torch.ones(len(rows), dtype=torch.int64), labels)


def oracle(row, beta, d, u):
    """Eq. 7's two terms in numpy, by exp."""
    r = np.longdouble(row[0]) - np.longdouble(row[1])
    up = 1 / (1 + np.exp(-beta * r))
    return float(d * (1 - up) if row[2] else u * up)


def check_golden(loss):
    # r = 2: desirable 1.5 * (1 - s(0.2)); r = 1: undesirable 0.8 * s(0.1)
    out = loss(beta=0.1, lambda_d=1.5, lambda_u=0.8)(logps([ROWS[0], ROWS[2]]))
    assert out.terms["apo"].values[0].item() == pytest.approx(1.5 / (1 + math.exp(0.2)), abs=1e-12)
    assert out.terms["apo"].values[1].item() == pytest.approx(0.8 / (1 + math.exp(-0.1)), abs=1e-12)
    assert out.terms["apo"].unit == "completion"
    assert out.chosen_rewards.tolist() == [pytest.approx(0.2)]
    assert out.rejected_rewards.tolist() == [pytest.approx(0.1)]


def check_gradient(loss):
    x = logps(ROWS, grad=True)
    total(loss(beta=0.2, lambda_d=1.3, lambda_u=0.9), x).backward()
    s = torch.sigmoid(0.2 * x.logratio.detach())
    torch.testing.assert_close(x.policy.grad, torch.where(x.is_desirable, -1.3, 0.9) * 0.2 * s * (1 - s))


def check_micro_batches(loss):
    one = loss(lambda_d=1.2)
    torch.testing.assert_close(total(one, logps(ROWS)), total(one, logps(ROWS[:1])) + total(one, logps(ROWS[1:])))


def check_oracle(loss):
    for options in [(0.1, 1.0, 1.0), (0.5, 1.33, 0.7)]:
        beta, d, u = options
        got = loss(beta=beta, lambda_d=d, lambda_u=u)(logps(ROWS)).terms["apo"].values
        np.testing.assert_allclose(got.numpy(), [oracle(row, *options) for row in ROWS], rtol=1e-10)


CHECKS = (check_golden, check_gradient, check_micro_batches, check_oracle)
MUTANTS = {
    "labels swapped": ("desirable, -rewards, rewards", "desirable, rewards, -rewards"),
    "weights swapped": ("desirable, desired, undesired", "desirable, undesired, desired"),
    "dropped reference": ("self.beta * logps.logratio", "self.beta * logps.policy"),
    "no beta": ("torch.sigmoid(signed)", "torch.sigmoid(signed / self.beta)"),
    "log of the sigmoid": ("torch.sigmoid(signed)", "-torch.nn.functional.logsigmoid(-signed)"),
    "early mean": ("torch.sigmoid(signed)", "torch.sigmoid(signed).mean()"),
    "rewards swapped": ("rewards[desirable], rewards[~desirable]", "rewards[~desirable], rewards[desirable]"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_apo_zero_unpaired(check):
    check(APOZeroUnpaired)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    changed = mutant(module, "APOZeroUnpaired", *MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(CHECKS, changed)


@given(rows_of, st.floats(0.01, 1))
def test_it_is_kto_at_the_reference_point_zero(rows, beta):
    x = logps(rows)
    zero = torch.zeros(1, dtype=torch.float64)
    partnered = UnpairedLogps(x.policy, x.reference, x.num_tokens, x.is_desirable, zero, zero)
    kto = losses.build("kto", {"beta": beta})(partnered).terms["kto"].values
    torch.testing.assert_close(APOZeroUnpaired(beta=beta)(x).terms["apo"].values, kto)


@given(rows_of, st.floats(0.01, 1))
def test_the_other_label_costs_what_is_left_of_the_weight(rows, beta):
    other = [(a, b, not label) for a, b, label in rows]
    both = sum(APOZeroUnpaired(beta=beta)(logps(some)).terms["apo"].values for some in (rows, other))
    torch.testing.assert_close(both, torch.ones_like(both))


def test_auto_weights_balance_the_labels():
    assert isinstance(APOZeroUnpaired(), DataAwareLoss)
    assert APOZeroUnpaired(lambda_d="auto", lambda_u="auto").fitted(50, 200) == APOZeroUnpaired(lambda_d=4.0, lambda_u=1.0)
    assert "outside the 1 to 4/3" in APOZeroUnpaired().doubt(50, 200)
    with pytest.raises(ValueError, match="call fitted"):
        APOZeroUnpaired(lambda_u="auto")(logps(ROWS))


@pytest.mark.parametrize("bad", [{"beta": 0}, {"lambda_d": 0}, {"lambda_u": "automatic"}, {"tau": 1}])
def test_bad_options_name_the_field(bad):
    with pytest.raises(UsageError, match=f"'{next(iter(bad))}'"):
        losses.build("apo_zero_unpaired", bad)


@given(rows_of, st.floats(0.01, 1))
def test_float32(rows, beta):
    exact = APOZeroUnpaired(beta=beta)(logps(rows)).terms["apo"].values
    single = APOZeroUnpaired(beta=beta)(logps(rows, dtype=torch.float32)).terms["apo"].values
    # the slope is at most beta / 4, on a log-ratio that is a few roundings of 200 nats at 2^-24 off
    assert (single.double() - exact).abs().max() <= beta * 200 * 2**-23 + 1e-6

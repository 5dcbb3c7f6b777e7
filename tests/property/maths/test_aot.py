"""AOT, paired and unpaired: golden values, gradients by rank, what sorting makes invariant, oracle, precision; and mutants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_rows import ROWS, check_all, logps, mutant, rows_of, total

from preftune.core.errors import UsageError
from preftune.maths.losses import aot as paired
from preftune.maths.losses import aot_unpaired as unpaired
from preftune.maths.losses.aot import AOT
from preftune.maths.losses.aot_unpaired import AOTUnpaired
from preftune.maths.losses.base import losses

betas = st.floats(0.01, 1)
KINDS = {"aot": (AOT, paired), "aot_unpaired": (AOTUnpaired, unpaired)}


def parts_of(name, rows):
    """The two samples whose quantiles are compared, by the paper's definition."""
    pc, pr, rc, rr = np.array([row[:4] for row in rows], dtype=np.float64).T
    return (pc - pr, rc - rr) if name == "aot" else (pc - rc, pr - rr)


def oracle(name, rows, beta, e=0.0):
    """The cost of the cheapest transport over all assignments (a convex cost): sorting is proved by it, not assumed."""
    from itertools import permutations

    u, v = parts_of(name, rows)
    costs = [
        sum((1 - e) * np.logaddexp(0, -beta * d) + e * np.logaddexp(0, beta * d) for d in u - v[list(order)])
        for order in permutations(range(len(rows)))
    ]
    return min(costs)


def checks_of(name):
    def check_golden(loss):
        # paired: u = 10, -2, -1; v = 3, 6, 20 -> sorted -2, -1, 10 against 3, 6, 20: d = -5, -7, -10
        # unpaired: r_w = 2, -1, -10; r_l = -5, 7, 11 -> sorted -10, -1, 2 against -5, 7, 11: d = -5, -8, -9
        d = [-5, -7, -10] if name == "aot" else [-5, -8, -9]
        out = loss(beta=0.1)(logps(ROWS))
        assert out.terms[name].values.tolist() == pytest.approx([math.log1p(math.exp(-0.1 * one)) for one in d], abs=1e-12)
        assert out.terms[name].unit == "pair"
        assert out.chosen_rewards.tolist() == pytest.approx([0.2, -0.1, -1.0])
        assert out.rejected_rewards.tolist() == pytest.approx([-0.5, 0.7, 1.1])
        assert not out.chosen_rewards.requires_grad
        smooth = loss(beta=0.1, label_smoothing=0.2)(logps(ROWS)).terms[name].values[0].item()
        assert smooth == pytest.approx(0.8 * math.log1p(math.exp(0.5)) + 0.2 * math.log1p(math.exp(-0.5)), abs=1e-12)

    def check_gradient(loss):
        x = logps(ROWS, grad=True)
        total(loss(beta=0.2, label_smoothing=0.1), x).backward()
        u, v = (torch.from_numpy(one) for one in parts_of(name, ROWS))
        ranks_u, ranks_v = u.argsort().argsort(), v.argsort().argsort()
        d = u.sort().values - v.sort().values
        slope = 0.2 * (0.1 - torch.sigmoid(-0.2 * d))  # dL_i/du_(i)
        torch.testing.assert_close(x.policy_chosen.grad, slope[ranks_u])
        torch.testing.assert_close(x.policy_rejected.grad, -slope[ranks_u if name == "aot" else ranks_v])

    def check_oracle(loss):
        generator = np.random.default_rng(0)
        rows = [(*generator.uniform(-20, 0, 4), 3, 4) for _ in range(5)]
        for beta, e in [(0.1, 0.0), (0.7, 0.0)]:
            assert total(loss(beta=beta, label_smoothing=e), logps(rows)).item() == pytest.approx(oracle(name, rows, beta, e))

    return check_golden, check_gradient, check_oracle


MUTANTS = {
    "policy not sorted": {
        "aot": ("(logps.policy_chosen - logps.policy_rejected).sort().values", "logps.policy_chosen - logps.policy_rejected"),
        "aot_unpaired": ("chosen.sort().values", "chosen"),
    },
    "other side not sorted": {
        "aot": ("(logps.reference_chosen - logps.reference_rejected).sort().values",
                "logps.reference_chosen - logps.reference_rejected"),
        "aot_unpaired": ("rejected.sort().values", "rejected"),
    },
    "sorted the other way": {
        "aot": ("(logps.reference_chosen - logps.reference_rejected).sort()",
                "(logps.reference_chosen - logps.reference_rejected).sort(descending=True)"),
        "aot_unpaired": ("rejected.sort()", "rejected.sort(descending=True)"),
    },
    "flipped": {"aot": ("(u - v)", "(v - u)"), "aot_unpaired": ("chosen.sort().values - rejected.sort().values",
                                                               "rejected.sort().values - chosen.sort().values")},
    "smoothing on one side": dict.fromkeys(KINDS, ("- e * functional.logsigmoid(-margins)", "")),
    "smoothing with the other sign": dict.fromkeys(KINDS, ("-(1 - e) *", "-(1 + e) *")),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_aot(name):
    check_all(checks_of(name), KINDS[name][0])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fault", MUTANTS)
def test_a_mutant_is_killed(fault, name):
    loss, module = KINDS[name]
    changed = mutant(module, loss.__name__, *MUTANTS[fault][name])
    with pytest.raises(AssertionError):
        check_all(checks_of(name), changed)


@given(rows_of, betas, st.randoms(use_true_random=False))
def test_which_reference_or_rejected_value_belongs_to_which_pair_is_not_used(rows, beta, rng):
    order = list(range(len(rows)))
    rng.shuffle(order)
    mixed = [(*row[:2], *rows[other][2:4], *row[4:]) for row, other in zip(rows, order, strict=True)]
    torch.testing.assert_close(total(AOT(beta=beta), logps(rows)), total(AOT(beta=beta), logps(mixed)))
    swapped = [(row[0], rows[o][1], row[2], rows[o][3], *row[4:]) for row, o in zip(rows, order, strict=True)]
    torch.testing.assert_close(total(AOTUnpaired(beta=beta), logps(rows)), total(AOTUnpaired(beta=beta), logps(swapped)))


@pytest.mark.parametrize("name", KINDS)
@given(rows_of, betas, st.floats(0, 0.49))
def test_one_pair_alone_is_dpo_and_a_step_is_more_than_its_pairs(name, rows, beta, e):
    loss = losses.build(name, {"beta": beta, "label_smoothing": e})
    dpo = losses.build("dpo", {"beta": beta, "label_smoothing": e})
    torch.testing.assert_close(total(loss, logps(rows[:1])), total(dpo, logps(rows[:1])))
    assert loss.is_batchwise
    if e == 0:  # the cheapest of all assignments, that of the pairs themselves among them
        assert total(loss, logps(rows)).item() <= total(dpo, logps(rows)).item() + 1e-9


@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_do_not_add_up(name):
    """Why the loop gives it the whole step."""
    loss = losses.build(name)
    parts = sum(total(loss, logps(ROWS[at : at + 1])) for at in range(3))
    assert abs(parts - total(loss, logps(ROWS))) > 1e-3


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bad", [{"beta": 0}, {"beta": "x"}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"tau": 1}])
def test_bad_options_name_the_field(name, bad):
    with pytest.raises(UsageError, match=f"'{next(iter(bad))}'"):
        losses.build(name, bad)


@pytest.mark.parametrize("name", KINDS)
@given(rows_of, betas)
def test_float32(name, rows, beta):
    loss = losses.build(name, {"beta": beta})
    exact = loss(logps(rows)).terms[name].values
    single = loss(logps(rows, dtype=torch.float32)).terms[name].values
    # four inputs up to 200 nats, each 2^-17 off at most; the slope is at most beta; sorting moves no rank by more than that
    assert (single.double() - exact).abs().max() <= beta * 4 * 2**-16 + 1e-5

"""Every loss over pairs of ``pair_cases``: its formula in numpy, the gradient by hand, invariances, micro-batches, precision."""

import numpy as np
import pytest
import torch
from pair_cases import BY_NAME, CASES, IDS, VARIANTS, Row, logps_of

from preftune.core.errors import UsageError
from preftune.maths.losses.base import losses
from preftune.maths.losses.mix import Mix
from preftune.maths.metrics import reduce_terms

COUNTS = {"pair": 1, "completion": 1, "chosen_token": 1}
ROWS = [
    Row(-10.0, -20.0, -12.0, -15.0, 4, 5),
    Row(-3.0, -1.0, -2.0, -2.5, 2, 9, 0.9, 2.0),
    Row(-12.0, -9.0, -10.0, -12.0, 30, 7, 0.6, 0.5),
    Row(-8.0, -8.5, -8.5, -8.25, 6, 6, 1.0, 3.0),
]
each = pytest.mark.parametrize(("case", "o"), VARIANTS, ids=IDS)


def total(loss, x):
    return reduce_terms(loss(x), COUNTS)


def random_rows(count, spread=4.0):
    """Completions of -40 to -5 nats, policies a few nats from their references; half of the labels with a confidence."""
    generator = np.random.default_rng(0)
    rows = []
    for at in range(count):
        references, moves = generator.uniform(-40, -5, 2), generator.uniform(-spread, spread, 2)
        confidence = float(generator.uniform(0.51, 0.99)) if at % 2 else 1.0
        tokens = (int(one) for one in generator.integers(3, 30, 2))
        rows.append(Row(*(references + moves), *references, *tokens, confidence, float(generator.integers(0, 7)) / 2))
    return rows


@each
def test_equals_the_equation_in_numpy(case, o):
    rows = [*ROWS, *random_rows(24)]
    out = case.build(o)(logps_of(rows))
    expected = [case.value(row, o) for row in rows]
    assert set(out.terms) == set(expected[0])
    for name, term in out.terms.items():
        np.testing.assert_allclose(term.values.numpy(), [one[name] for one in expected], rtol=1e-10, atol=1e-12)
        assert term.weight == o.get(case.weights.get(name), 1.0)
    np.testing.assert_allclose(out.chosen_rewards.numpy(), [case.rewards(row, o)[0] for row in rows], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(out.rejected_rewards.numpy(), [case.rewards(row, o)[1] for row in rows], rtol=1e-10, atol=1e-12)


@each
def test_the_gradient_is_the_one_derived_by_hand(case, o):
    rows = [*ROWS, *random_rows(24)]
    x = logps_of(rows, grad=True)
    out = case.build(o)(x)
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad
    reduce_terms(out, COUNTS).backward()
    expected = np.array([case.slopes(row, o) for row in rows]).T
    np.testing.assert_allclose(x.policy_chosen.grad.numpy(), expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(x.policy_rejected.grad.numpy(), expected[1], rtol=1e-9, atol=1e-12)


@each
def test_micro_batches_add_up(case, o):
    loss = case.build(o)
    whole = total(loss, logps_of(ROWS))
    for cuts in ([1], [2], [1, 3]):
        parts = [ROWS[a:b] for a, b in zip([0, *cuts], [*cuts, len(ROWS)], strict=True)]
        torch.testing.assert_close(sum(total(loss, logps_of(part)) for part in parts), whole)


@each
def test_only_log_ratios_are_read(case, o):
    """Policy and reference of one completion moved together: nothing changes, or the reference was not read at all."""
    loss = case.build(o)
    before = total(loss, logps_of(ROWS))
    if loss.needs_reference:
        moved = [Row(r.pc + 3, r.pr - 7, r.rc + 3, r.rr - 7, r.tc, r.tr, r.c, r.d) for r in ROWS]
        other = [Row(r.pc, r.pr, r.rc + 1, r.rr - 1, r.tc, r.tr, r.c, r.d) for r in ROWS]
        assert not torch.isclose(total(loss, logps_of(other)), before), "the reference is read"
    else:
        moved = [Row(r.pc, r.pr, r.rc + 3, r.rr - 7, r.tc, r.tr, r.c, r.d) for r in ROWS]
    torch.testing.assert_close(total(loss, logps_of(moved)), before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_common_shift_of_the_policy_matters_only_where_more_than_the_margin_is_read(case):
    loss = case.build(case.variants[0])
    moved = [Row(r.pc - 2, r.pr - 2, r.rc, r.rr, r.tc, r.tr, r.c, r.d) for r in ROWS]
    one, other = total(loss, logps_of(ROWS)), total(loss, logps_of(moved))
    assert bool(torch.isclose(one, other, rtol=1e-9)) is case.only_margin


@each
def test_a_confidence_is_the_expectation_over_the_label(case, o):
    if not case.is_expectation:
        pytest.skip("its own paper says what a probability does; the equation in numpy has it")
    loss = case.build(o)
    for row in random_rows(12):
        sure = Row(row.pc, row.pr, row.rc, row.rr, row.tc, row.tr, 1.0, row.d)
        doubted = Row(row.pc, row.pr, row.rc, row.rr, row.tc, row.tr, 0.7, row.d)
        expected = 0.7 * total(loss, logps_of([sure])) + 0.3 * total(loss, logps_of([sure.swapped]))
        torch.testing.assert_close(total(loss, logps_of([doubted])), expected)


def test_robust_is_unbiased():
    """The mean over flips of the robust loss is the clean DPO loss."""
    e, row = 0.2, ROWS[0]
    robust = losses.build("robust", {"beta": 0.1, "label_smoothing": e})
    mean = (1 - e) * total(robust, logps_of([row])) + e * total(robust, logps_of([row.swapped]))
    torch.testing.assert_close(mean, total(losses.build("dpo", {"beta": 0.1}), logps_of([row])))


def test_special_cases_are_other_losses():
    dpo, x = losses.build("dpo", {"beta": 0.1}), logps_of(ROWS)
    for name, options in {
        "robust": {"label_smoothing": 0.0},
        "odpo": {"alpha": 0.0},
        "r_dpo": {"alpha": 0.0},
        "dpop": {"lambda_p": 0.0},
    }.items():
        sure = logps_of([Row(r.pc, r.pr, r.rc, r.rr, r.tc, r.tr, 1.0, r.d) for r in ROWS])
        torch.testing.assert_close(total(losses.build(name, {"beta": 0.1, **options}), sure), total(dpo, sure))
    alphapo, simpo = losses.build("alphapo", {"alpha": 0.0, "beta": 2.0, "gamma": 0.5}), losses.build("simpo", {"gamma": 0.5})
    torch.testing.assert_close(total(alphapo, x), total(simpo, x))
    near, alpha = losses.build("alphapo", {"alpha": 1e-7, "beta": 2.0, "gamma": 0.5}), 1e-6
    torch.testing.assert_close(total(near, x), total(alphapo, x), rtol=alpha, atol=alpha)


def test_exo_is_at_rest_where_the_policy_says_what_the_label_says():
    e = 0.1
    m = np.log((1 - e) / e)
    x = logps_of([Row(-10.0 + m / 0.2, -10.0, -10.0, -10.0)], grad=True)
    loss = total(losses.build("exo_pair", {"beta": 0.2, "label_smoothing": e}), x)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert abs(x.policy_chosen.grad.item()) < 1e-12


BAD = [(case.name, *next(iter(bad.items()))) for case in CASES for bad in case.bad]
NUMBERS = {"beta", "label_smoothing", "alpha", "tau", "lambda_p", "gamma", "slope", "divergence_alpha"}


@pytest.mark.parametrize(("name", "field", "value"), BAD)
def test_bad_options_name_the_field_and_the_range(name, field, value):
    with pytest.raises(UsageError, match=field) as caught:
        losses.build(name, {field: value})
    is_known = field in losses.factory(name).__dataclass_fields__
    if is_known and field in NUMBERS and not isinstance(value, str):
        assert any(word in str(caught.value) for word in ("above", "below", "at least", "at most")), caught.value


@each
def test_float32_and_bfloat16(case, o):
    """A loss adds roundings of its own operations alone; its inputs here are exact in both precisions."""
    loss, exact = case.build(o), case.build(o)(logps_of(ROWS))
    for dtype, bits in ((torch.float32, 24), (torch.bfloat16, 8)):
        rows = [Row(r.pc, r.pr, r.rc, r.rr, r.tc, r.tr, 0.75 if r.c < 1 else 1.0, r.d) for r in ROWS]
        exact, out = loss(logps_of(rows)), loss(logps_of(rows, dtype=dtype))
        for name, term in out.terms.items():
            assert term.values.dtype == dtype
            # about ten operations, each rounding to `bits` bits, on values that are at most a few times the result or 1; a square
            # doubles a relative error and 1 - 2e divides by one half: 32 roundings of 2^-bits
            gap = (term.values.double() - exact.terms[name].values).abs()
            assert (gap <= 32 * 2.0**-bits * (1 + exact.terms[name].values.abs())).all(), (dtype, name, gap)


@each
def test_extreme_margins_stay_finite(case, o):
    rows = [Row(0.0, -1e5, -1e5, 0.0, 3, 3), Row(-1e5, 0.0, 0.0, -1e5, 3, 3, 0.8), Row(-1e5, -1e5, 0.0, 0.0, 3, 3)]
    x = logps_of(rows, grad=True, dtype=torch.float32)
    out = total(case.build(o), x)
    out.backward()
    assert torch.isfinite(out)
    assert torch.isfinite(x.policy_chosen.grad).all()
    assert torch.isfinite(x.policy_rejected.grad).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mix_takes_it(case):
    options = case.variants[0]
    mixed, alone, dpo = Mix({case.name: {"weight": 0.5, **options}, "dpo": {}}), case.build(options), losses.build("dpo")
    x = logps_of(ROWS)
    torch.testing.assert_close(total(mixed, x), 0.5 * total(alone, x) + total(dpo, x))
    assert mixed.needs >= alone.needs


def test_a_wrong_shape_is_refused_in_tests():
    x = logps_of(ROWS)
    with pytest.raises(Exception, match=r"(?i)type-check"):
        type(x)(
            x.policy_chosen, x.policy_rejected, x.reference_chosen[:2], x.reference_rejected, x.chosen_tokens, x.rejected_tokens
        )


def test_the_table_is_whole():
    """A loss over pairs that is registered is in the table, or has a file of tests of its own."""
    own = {"dpo", "ipo", "simpo", "orpo", "mix", "ld_dpo"}
    theirs = {name for name in losses.names() if losses.factory(name).view == "pairs"}
    assert own.isdisjoint(BY_NAME)
    assert set(BY_NAME) <= theirs

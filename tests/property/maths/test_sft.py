"""SFT: one token, one weight; the same seven kinds of test as every loss, and its mutants."""

import inspect
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.core.errors import UsageError
from preftune.maths.losses import sft as module
from preftune.maths.losses.base import losses
from preftune.maths.losses.sft import SFT
from preftune.maths.metrics import reduce_terms
from preftune.maths.types import SequenceLogps

rows_of = st.lists(st.tuples(st.floats(-200, 0), st.integers(1, 60)), min_size=1, max_size=8)


def sequences(rows, grad=False, dtype=torch.float64):
    values, counts = zip(*rows, strict=True)
    return SequenceLogps(torch.tensor(values, dtype=dtype).requires_grad_(grad), torch.tensor(counts))


def mean(loss, rows, num_tokens=None):
    x = sequences(rows)
    return reduce_terms(loss(x), {"token": num_tokens or sum(n for _, n in rows), "completion": len(rows), "pair": len(rows)})


def check_golden(loss):
    # -6 nats over 3 tokens and -2 over 1: (6 + 2) / 4 = 2 nats a token, not the mean of means (2 + 2) / 2 by luck alone
    assert mean(loss, [(-6.0, 3), (-2.0, 1)]).item() == pytest.approx(2.0)
    # 9 nats over 3 tokens and 1 over 1: 10 / 4 = 2.5; a mean of means would be 2
    assert mean(loss, [(-9.0, 3), (-1.0, 1)]).item() == pytest.approx(2.5)


def check_gradient(loss):
    x = sequences([(-9.0, 3), (-1.0, 1)], grad=True)
    (reduce_terms(loss(x), {"token": 4, "completion": 2, "pair": 2})).backward()
    torch.testing.assert_close(x.logps.grad, torch.full((2,), -0.25, dtype=torch.float64))


def check_micro_batches(loss):
    rows = [(-9.0, 3), (-1.0, 1), (-70.0, 20)]
    parts = mean(loss, rows[:1], 24) + mean(loss, rows[1:], 24)
    torch.testing.assert_close(mean(loss, rows), parts)


CHECKS = (check_golden, check_gradient, check_micro_batches)


def check_all(loss):
    for check in CHECKS:
        check(loss)


MUTANTS = {
    "flipped sign": ("-logps.logps", "logps.logps"),
    "unit of completions": ('Term(-logps.logps, "token")', 'Term(-logps.logps, "completion")'),
    "own length": ("-logps.logps,", "-logps.logps / logps.num_tokens,"),
    "early mean": ("-logps.logps,", "-logps.logps.mean().reshape(1),"),
    "doubled": ("-logps.logps,", "-2 * logps.logps,"),
    "detached": ("-logps.logps,", "-logps.logps.detach(),"),
}


def mutant(old, new):
    source = inspect.getsource(module)
    assert source.count(old) == 1
    source = re.sub(r"^@losses.register.*$", "", source.replace(old, new), flags=re.MULTILINE)
    scope = {"__name__": module.__name__}
    exec(compile(source, "mutant", "exec"), scope)
    return scope["SFT"]


@pytest.mark.parametrize("check", CHECKS)
def test_sft(check):
    check(SFT())


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name):
    changed = mutant(*MUTANTS[name])()
    with pytest.raises((AssertionError, RuntimeError)):
        check_all(changed)


@given(rows_of, st.randoms())
def test_order_does_not_matter(rows, random):
    shuffled = rows[:]
    random.shuffle(shuffled)
    torch.testing.assert_close(mean(SFT(), rows), mean(SFT(), shuffled))


@given(rows_of)
def test_equals_plain_numpy(rows):
    values, counts = np.array(rows, dtype=np.float64).T
    np.testing.assert_allclose(mean(SFT(), rows).item(), -values.sum() / counts.sum(), rtol=1e-12, atol=1e-12)


@given(rows_of)
def test_float32_and_bfloat16(rows):
    exact = -sequences(rows).logps
    # the loss is a sign: the only error is the rounding of the input, 2^-25 and 2^-9 of it
    for dtype, rtol in ((torch.float32, 2**-24), (torch.bfloat16, 2**-8)):
        got = SFT()(sequences(rows, dtype=dtype)).terms["sft"].values.double()
        torch.testing.assert_close(got, exact, rtol=rtol, atol=1e-37)  # below 1e-37 float32 has fewer bits


def test_bad_options_name_the_field():
    with pytest.raises(UsageError, match="beta"):
        losses.build("sft", {"beta": 0.1})


def test_it_declares_what_it_takes():
    assert (SFT.view, SFT.needs_reference) == ("demonstrations", False)

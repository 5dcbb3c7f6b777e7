"""Rows of log-probabilities for the tests of losses over pairs, and one place of a loss's source changed."""

import inspect
import re

import torch
from hypothesis import strategies as st

from preftune.maths.metrics import reduce_terms
from preftune.maths.types import PairLogps

nats = st.floats(-200, -0.01, allow_nan=False)
rows_of = st.lists(st.tuples(nats, nats, nats, nats, st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8)
ROWS = [(-10.0, -20.0, -12.0, -15.0, 4, 5), (-3.0, -1.0, -2.0, -8.0, 2, 9), (-50.0, -49.0, -40.0, -60.0, 30, 7)]


def logps(rows, grad=False, dtype=torch.float64):
    """PairLogps of rows (policy chosen, policy rejected, reference chosen, reference rejected, tokens, tokens)."""
    t = torch.tensor([row[:4] for row in rows], dtype=dtype).T
    n = torch.tensor([row[4:] for row in rows], dtype=torch.int64).T
    return PairLogps(t[0].clone().requires_grad_(grad), t[1].clone().requires_grad_(grad), t[2], t[3], n[0], n[1])


def total(loss, x):
    """Sum of every weighted term over the pairs or completions: what the loop divides by their number."""
    return reduce_terms(loss(x), {"pair": 1, "completion": 1, "chosen_token": 1})


def mutant(module, name, old, new):
    """The class of this name with one place of its module's source changed."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    source = re.sub(r"^@losses.register.*$", "", source.replace(old, new), flags=re.MULTILINE)
    scope = {"__name__": module.__name__}
    exec(compile(source, "mutant", "exec"), scope)
    return scope[name]


def check_all(checks, loss):
    """Every check of a loss class, one after the other."""
    for check in checks:
        check(loss)

"""Tests of two systems on the same prompts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom


def sign_flip(differences: ArrayLike, *, flips: int = 10_000, seed: int = 0) -> float:
    r"""Two-sided p of a mean difference of zero: the sign of each prompt's difference is flipped at random.

        p = (1 + #{|sum +-d| >= |sum d|}) / (1 + flips)

    (Fisher's randomisation test; the added ones keep it valid, Phipson & Smyth 2010.)

    Parameters
        differences: (prompts,), the first system's score minus the second's.

    >>> sign_flip([0.0, 0.0])
    1.0
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) == 0:
        raise ValueError(f"the test needs a list of at least one difference, got shape {d.shape}")
    rng = np.random.default_rng(seed)
    observed = abs(d.sum()) * (1 - 1e-12)  # sums of the same numbers in another order may differ in the last bit
    reached = 0
    for start in range(0, flips, 1000):
        signs = rng.integers(0, 2, size=(min(1000, flips - start), len(d))) * 2.0 - 1.0
        reached += int((np.abs(signs @ d) >= observed).sum())
    return (1 + reached) / (1 + flips)


def sign_test(wins: int, losses: int) -> float:
    r"""Exact two-sided sign test, which on binary outcomes is McNemar's; ties are dropped by the caller and shown.

        p = min(1, 2 BinCDF(min(wins, losses); wins + losses, 1/2))

    >>> round(sign_test(30, 14), 5)
    0.02263
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"counts cannot be negative, got {wins} and {losses}")
    return min(1.0, 2.0 * float(binom.cdf(min(wins, losses), wins + losses, 0.5)))

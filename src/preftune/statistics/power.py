"""How many prompts an effect needs, and what effect a number of prompts can show.

W is the win rate with ties as one half, delta = |W - 1/2|, and t the share of ties, so that the variance of a score is
at most (1 - t) / 4 at W = 1/2 and (1 - t) / 4 - delta^2 at the alternative.
"""

from __future__ import annotations

import math

from scipy.stats import norm


def prompts_needed(delta: float, *, tie_share: float = 0.0, alpha: float = 0.05, power: float = 0.8) -> int:
    r"""Prompts that show W = 1/2 + delta with the given power in a two-sided test at alpha.

        n = ((z_{1-alpha/2} sqrt((1-t)/4) + z_{power} sqrt((1-t)/4 - delta^2)) / delta)^2

    Parameters
        delta: |W - 1/2|, in (0, sqrt((1 - t) / 4)].
        tie_share: t, in [0, 1).

    Raises
        ValueError: an effect that so many ties leave no room for, or zero.

    >>> [prompts_needed(delta) for delta in (0.02, 0.03, 0.05, 0.08, 0.10)]
    [4904, 2178, 783, 305, 194]
    """
    half = _half_spread(tie_share)
    if not 0 < delta <= half:
        raise ValueError(f"delta must lie in (0, {half:.3f}] with a tie share of {tie_share}, got {delta}")
    z_alpha, z_power = float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))
    # max(0, ...): at delta = half the second variance is zero up to rounding
    return math.ceil(((z_alpha * half + z_power * math.sqrt(max(0.0, half * half - delta * delta))) / delta) ** 2)


def detectable_effect(prompts: int, *, tie_share: float = 0.0, alpha: float = 0.05, power: float = 0.8) -> float:
    r"""The smallest |W - 1/2| that so many prompts show with the given power.

        MDE = (z_{1-alpha/2} + z_{power}) sqrt((1-t) / 4n)

    cut to one half, the largest effect there is.

    >>> round(detectable_effect(783), 3)
    0.05
    """
    if prompts < 1:
        raise ValueError(f"prompts must be at least 1, got {prompts}")
    z = float(norm.ppf(1 - alpha / 2)) + float(norm.ppf(power))
    return min(0.5, z * _half_spread(tie_share) / math.sqrt(prompts))


def _half_spread(tie_share: float) -> float:
    if not 0 <= tie_share < 1:
        raise ValueError(f"tie_share must lie in [0, 1), got {tie_share}")
    return math.sqrt((1 - tie_share) / 4)

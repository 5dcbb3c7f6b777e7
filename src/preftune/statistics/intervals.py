"""Intervals for a mean of scores in [0, 1], one score for each prompt.

The unit is the prompt: several judgements of one prompt are averaged first (``mean_by_cluster``), never resampled
as if they were independent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

Floats: TypeAlias = NDArray[np.float64]

PSEUDO = 2  # wins and as many losses, after Agresti & Coull 1998: two of each for a 95 % interval
REPLICATES = 4000


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided interval, both ends included, and how it was made."""

    low: float
    high: float
    method: Literal["bootstrap-t", "wilson", "refit-bootstrap", "MOVER"]
    level: float = 0.95

    @property
    def width(self) -> float:
        """High minus low."""
        return self.high - self.low

    def contains(self, value: float) -> bool:
        """Whether the value lies inside."""
        return self.low <= value <= self.high


def wilson(successes: float, trials: float, level: float = 0.95) -> Interval:
    r"""Wilson's score interval of a rate (Wilson 1927, eq. in Brown, Cai & DasGupta 2001, section 3.1.1).

        (p + z^2/2n +- z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n),    p = successes / trials

    Parameters
        successes, trials: counts; fractions are allowed (a tie is half a success). trials > 0.
        level: coverage, in (0, 1).

    Raises
        ValueError: no trials, or successes outside [0, trials].

    >>> interval = wilson(3, 100)
    >>> print(f"{interval.low:.4f} {interval.high:.4f}")
    0.0103 0.0845
    """
    if not trials > 0 or not 0 <= successes <= trials:
        raise ValueError(f"a rate needs 0 <= successes <= trials and a trial, got {successes} of {trials}")
    z = float(norm.ppf(0.5 + level / 2))
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    half = z * np.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (centre - half) / scale, (centre + half) / scale
    # Exact at the edges, where rounding would leave a bound a hair inside or outside.
    return Interval(0.0 if successes == 0 else float(low), 1.0 if successes == trials else float(high), "wilson", level)


def mean_interval(
    scores: ArrayLike, *, level: float = 0.95, replicates: int = REPLICATES, seed: int = 0, pseudo: int = PSEUDO
) -> Interval:
    r"""Interval of a mean score over prompts that holds near 0 and 1: symmetric bootstrap-t with pseudo-scores.

    Let a be the n scores with ``pseudo`` ones and ``pseudo`` zeros added, of size m, mean w and standard error
    e = sd(a) / sqrt(m). Resamples of a give t* = |w* - w| / e*, and with q the ``level`` quantile of t* the interval is

        [w - q e, w + q e], cut to [0, 1];    Wilson's interval where all scores agree (sd = 0)

    The pseudo-scores are those of Agresti & Coull 1998 (The American Statistician 52(2)); the studentised bootstrap
    is Efron & Tibshirani 1993, section 12.5, in its symmetric form (Hall 1988, Annals of Statistics 16(3)). The
    equal-tailed form corrects for skewness in the direction in which the pseudo-scores already have, and covers only
    0.81 to 0.93 at a mean of 0.97; the symmetric one covers 0.94 to 0.99 at means of 0.5 to 0.97 with 30 to 500 prompts.
    Resamples without any spread have no t and are left out.

    Parameters
        scores: (prompts,) in [0, 1], one for each prompt.
        replicates, seed: of the bootstrap; equal seeds give equal intervals.
        pseudo: wins, and as many losses, that are added.

    Raises
        ValueError: no scores, or one outside [0, 1].

    >>> interval = mean_interval([1.0] * 70 + [0.0] * 30)
    >>> print(f"{interval.low:.2f} {interval.high:.2f} {interval.method}")
    0.60 0.79 bootstrap-t
    """
    values = _scores(scores)
    if np.ptp(values) == 0:
        return wilson(float(values[0]) * len(values), len(values), level)
    is_mirrored = _is_mirrored(values)
    augmented = np.concatenate([1 - values if is_mirrored else values, np.ones(pseudo), np.zeros(pseudo)])
    size = len(augmented)
    mean = float(augmented.mean())
    error = float(augmented.std(ddof=1)) / np.sqrt(size)
    # A resample is decided by how often each distinct value comes: a multinomial draw, far cheaper than indices.
    distinct, counts = np.unique(augmented, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(size, counts / size, size=replicates).astype(np.float64)
    means = drawn @ distinct / size
    variances = ((drawn * (distinct - mean) ** 2).sum(axis=1) - size * (means - mean) ** 2) / (size - 1)
    spread = variances > 1e-12
    t = np.abs(means[spread] - mean) / np.sqrt(variances[spread] / size)
    half = float(np.quantile(t, level)) * error
    low, high = float(max(0.0, mean - half)), float(min(1.0, mean + half))
    return Interval(*((1 - high, 1 - low) if is_mirrored else (low, high)), "bootstrap-t", level)


def difference_interval(first: ArrayLike, second: ArrayLike, *, level: float = 0.95, seed: int = 0) -> tuple[float, Interval]:
    r"""The difference of the mean scores of two independent groups, and its interval (MOVER).

    With means p, q and their intervals [l, u] and [m, v] (``mean_interval``), d = p - q lies in

        [d - sqrt((p - l)^2 + (v - q)^2), d + sqrt((u - p)^2 + (q - m)^2)]

    (Zou & Donner 2008, Statistics in Medicine 27, eq. 7; with Wilson's intervals it is Newcombe's method 10.)

    Parameters
        first, second: (units,) in [0, 1], one score for each unit. seed: of the intervals' resamples.

    Raises
        ValueError: no scores, or one outside [0, 1].

    >>> value, interval = difference_interval([1.0] * 30 + [0.0] * 10, [1.0] * 20 + [0.0] * 20)
    >>> value, interval.low > 0
    (0.25, True)
    """
    p, q = float(_scores(first).mean()), float(_scores(second).mean())
    one, other = mean_interval(first, level=level, seed=seed), mean_interval(second, level=level, seed=seed)
    # the interval of a mean is of its augmented sample and may end a hair on the wrong side of the mean itself
    low = float(np.hypot(max(0.0, p - one.low), max(0.0, other.high - q)))
    high = float(np.hypot(max(0.0, one.high - p), max(0.0, q - other.low)))
    return p - q, Interval(max(-1.0, p - q - low), min(1.0, p - q + high), "MOVER", level)


def mean_by_cluster(values: ArrayLike, clusters: Sequence[Hashable]) -> Floats:
    """The mean of each cluster, in the order of first appearance: one score for each prompt.

    >>> mean_by_cluster([1.0, 0.0, 1.0], ["p", "p", "q"])
    array([0.5, 1. ])
    """
    array = np.asarray(values, dtype=np.float64)
    numbers = _cluster_numbers(clusters, len(array))
    return np.bincount(numbers, weights=array) / np.bincount(numbers)


def clustered_standard_error(values: ArrayLike, clusters: Sequence[Hashable]) -> float:
    r"""Standard error of the plain mean of judgements that come in clusters.

        sqrt(sum_c (sum_{i in c} (y_i - mean))^2) / N

    (Liang & Zeger 1986, with an intercept only; Miller 2024, arXiv:2411.00640, eq. 4.) Judgements of one prompt
    move together, so the error of an independent sample would be too small.

    >>> clustered_standard_error([1, 1, 0, 0], ["p", "p", "q", "q"])  # sqrt(1^2 + 1^2) / 4
    0.3535533905932738
    """
    array = np.asarray(values, dtype=np.float64)
    sums = np.bincount(_cluster_numbers(clusters, len(array)), weights=array - array.mean())
    return float(np.sqrt((sums**2).sum()) / len(array))


def _is_mirrored(values: Floats) -> bool:
    """Whether to resample 1 - values: of a sample and its mirror image one is drawn, so that swapping systems mirrors exactly."""
    differences = np.sort(values) - np.sort(1 - values)
    first = differences[differences != 0]
    return bool(len(first) and first[0] > 0)


def _cluster_numbers(clusters: Sequence[Hashable], size: int) -> NDArray[np.int64]:
    if len(clusters) != size or size == 0:
        raise ValueError(f"{size} values need as many cluster names and at least one, got {len(clusters)}")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)


def _scores(scores: ArrayLike) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"an interval needs a list of at least one score, got shape {values.shape}")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError("scores must lie in [0, 1]")
    return values

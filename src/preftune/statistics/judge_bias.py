"""What a judge prefers apart from quality: a place, or a length."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from preftune.statistics.intervals import Interval, difference_interval, mean_by_cluster, mean_interval

MIN_PROMPTS = 10  # of each model's longer texts; fewer say nothing of length


@dataclass(frozen=True, slots=True)
class JudgeBias:
    """Two shares in which one half is no preference.

    Parameters
        first: share of judgements that the text shown first wins, with its interval over prompts; quality cancels, since
            every pair is shown in both orders.
        longer: share of prompts that the longer text wins, or None with the ``reason``; the models cancel, see ``judge_bias``.
    """

    first: float
    first_interval: Interval
    longer: float | None
    longer_interval: Interval | None
    reason: str = ""


def judge_bias(
    forward: ArrayLike, backward: ArrayLike, length_differences: ArrayLike, clusters: Sequence[Hashable], seed: int = 0
) -> JudgeBias:
    r"""The judge's preference for the first place and for length.

        first  = mean (f + b) / 2
        longer = (m+ + 1 - m-) / 2,    m+- = mean of (f + 1 - b) / 2 over prompts where d > 0, and where d < 0

    f: score of the policy shown first, b: score of the baseline shown first; each is the share that the first place got. In
    ``longer`` the policy's advantage enters m+ and m- alike and cancels, so a model that is better and longer does not make the
    judge look fond of length; what stays may still be deserved, where longer texts of the same model are better.
    Interval of ``longer``: that of a difference of independent means (``difference_interval``).

    Parameters
        forward, backward: (judgements,) in [0, 1]. length_differences: policy minus baseline, characters.
        clusters: the prompt of each judgement, the unit of both intervals.

    >>> round(judge_bias([1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0], [1, 1, -1, -1], "abcd").first, 3)
    0.625
    """
    f, b = np.asarray(forward, dtype=np.float64), np.asarray(backward, dtype=np.float64)
    places = mean_by_cluster((f + b) / 2, clusters)
    first_interval = mean_interval(places, seed=seed)
    scores = mean_by_cluster((f + 1 - b) / 2, clusters)
    lengths = mean_by_cluster(length_differences, clusters)
    ours, theirs = scores[lengths > 0], scores[lengths < 0]
    first = float(places.mean())
    if min(len(ours), len(theirs)) < MIN_PROMPTS:
        reason = (
            f"the policy's text is longer on {len(ours)} prompts and shorter on {len(theirs)}; at least {MIN_PROMPTS} of each"
        )
        return JudgeBias(first, first_interval, None, None, reason)
    difference, of_it = difference_interval(ours, theirs, seed=seed)
    interval = Interval((1 + of_it.low) / 2, (1 + of_it.high) / 2, of_it.method)
    return JudgeBias(first, first_interval, (1 + difference) / 2, interval)

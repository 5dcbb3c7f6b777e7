"""Intervals against statsmodels, worked figures, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from preftune.statistics.intervals import clustered_standard_error, difference_interval, mean_by_cluster, mean_interval, wilson


@pytest.mark.parametrize(("successes", "trials"), [(3, 100), (0, 100), (100, 100), (0, 313), (1, 2), (250, 500), (7, 9)])
def test_wilson_equals_statsmodels(successes: int, trials: int) -> None:
    low, high = proportion_confint(successes, trials, method="wilson")
    interval = wilson(successes, trials)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-12)


def test_wilson_golden_values() -> None:
    # p = .03, n = 100, z = 1.959964: centre (.03 + 3.841459/200) / 1.03841459 = .047387,
    # half 1.959964 sqrt(.03 * .97 / 100 + 3.841459 / 40000) / 1.03841459 = .037140
    interval = wilson(3, 100)
    assert interval.low == pytest.approx(0.047387 - 0.037140, abs=2e-5)
    assert interval.high == pytest.approx(0.047387 + 0.037140, abs=2e-5)
    assert wilson(0, 100).high == pytest.approx(0.037, abs=5e-4)
    assert wilson(0, 313).high == pytest.approx(0.0121, abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (-1, 5), (6, 5), (float("nan"), 5)])
def test_wilson_refuses_what_is_no_rate(successes: float, trials: float) -> None:
    with pytest.raises(ValueError, match="a rate needs"):
        wilson(successes, trials)


def coverage(mean: float, size: int, *, ties: float, samples: int, replicates: int, pseudo: int = 2) -> float:
    """Share of samples whose interval holds the true mean."""
    rng = np.random.default_rng(int(mean * 1000) + size)
    tie = min(ties, 1.8 * (1 - mean))
    chances = [mean - tie / 2, tie, 1 - mean - tie / 2]
    hits = 0
    for _ in range(samples):
        scores = rng.choice([1.0, 0.5, 0.0], p=chances, size=size)
        hits += mean_interval(scores, replicates=replicates, pseudo=pseudo).contains(mean)
    return hits / samples


@pytest.mark.parametrize("mean", [0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("size", [30, 100, 500])
def test_coverage_holds_near_the_edge(mean: float, size: int) -> None:
    # 95 % nominal; 500 samples have a standard error of .01 at .95, so .92 is three of them below
    assert coverage(mean, size, ties=0.0, samples=500, replicates=500) >= 0.92
    assert coverage(mean, size, ties=0.3, samples=300, replicates=500) >= 0.91


def test_coverage_fails_without_pseudo_scores() -> None:
    for mean, size in ((0.9, 30), (0.97, 100)):
        assert coverage(mean, size, ties=0.0, samples=500, replicates=500, pseudo=0) < 0.91


def test_two_pseudo_wins_and_losses_by_default() -> None:
    # the middle of an interval that is not cut is the mean with the pseudo-scores: (60 + 2) / (100 + 4)
    low = mean_interval([1.0] * 60 + [0.0] * 40)
    assert (low.low + low.high) / 2 == pytest.approx(62 / 104, abs=1e-12)
    assert low == mean_interval([1.0] * 60 + [0.0] * 40, pseudo=2)


def test_wilson_where_all_scores_agree() -> None:
    for score in (0.0, 0.5, 1.0):
        interval = mean_interval([score] * 40)
        assert interval == wilson(40 * score, 40)
        assert interval.method == "wilson"
    assert mean_interval([1.0]).low == pytest.approx(wilson(1, 1).low)


def test_seed_decides_and_bounds_stay_in_the_unit_interval() -> None:
    scores = [1.0] * 29 + [0.0]
    assert mean_interval(scores) == mean_interval(scores)
    mixed = [1.0] * 20 + [0.0] * 9 + [0.5, 0.25]
    assert mean_interval(mixed, seed=1) != mean_interval(mixed)
    assert mean_interval(scores).high == 1.0
    assert mean_interval(scores).contains(29 / 30)


@pytest.mark.parametrize("scores", [[], [1.1], [float("nan")], [[0.5]]])
def test_bad_scores_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="score"):
        mean_interval(scores)


def test_clustered_error_is_larger_than_the_independent_one() -> None:
    # 300 prompts with 4 judgements each that nearly agree
    rng = np.random.default_rng(0)
    prompt = rng.random(300)
    values = (rng.random((300, 4)) < prompt[:, None]).astype(float)
    clusters = [index for index in range(300) for _ in range(4)]
    independent = values.std() / np.sqrt(values.size)
    clustered = clustered_standard_error(values.ravel(), clusters)
    by_prompt = values.mean(axis=1).std() / np.sqrt(300)
    assert clustered == pytest.approx(by_prompt, rel=1e-9)
    assert clustered > 1.2 * independent


def test_clustered_error_equals_statsmodels() -> None:
    sm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(1)
    values, clusters = rng.random(60), rng.integers(0, 12, 60)
    fit = sm.OLS(values, np.ones(60)).fit(cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False})
    assert clustered_standard_error(values, clusters.tolist()) == pytest.approx(float(fit.bse[0]), rel=1e-9)


def test_clusters_are_averaged_in_order_of_appearance() -> None:
    assert mean_by_cluster([1, 0, 0.5, 1], ["b", "a", "b", "a"]).tolist() == [0.75, 0.5]
    with pytest.raises(ValueError, match="cluster names"):
        mean_by_cluster([1.0], [])


def test_the_difference_of_two_groups_is_covered() -> None:
    """In 400 draws of two groups of 60 with means .7 and .55, the interval holds the true difference in 91 to 99 %."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(400):
        first, second = (rng.random(60) < 0.7).astype(float), (rng.random(60) < 0.55).astype(float)
        value, interval = difference_interval(first, second)
        assert interval.low <= value <= interval.high
        hits += interval.contains(0.15)
    assert 0.91 <= hits / 400 <= 0.99


def test_swapping_the_groups_mirrors_the_difference() -> None:
    first, second = [1.0, 0.5, 1.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.0, 1.0]
    value, interval = difference_interval(first, second)
    other, mirrored = difference_interval(second, first)
    assert other == -value
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))

"""What must hold of any scores: intervals, clusters and length control."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from preftune.statistics.intervals import clustered_standard_error, mean_by_cluster, mean_interval, wilson
from preftune.statistics.length_control import length_control
from preftune.statistics.paired import sign_test
from preftune.statistics.power import detectable_effect, prompts_needed

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=80)


@given(SCORES)
@settings(max_examples=60)
def test_interval_holds_the_mean_and_stays_in_bounds(scores: list[float]) -> None:
    interval = mean_interval(scores, replicates=400)
    assert 0 <= interval.low <= np.mean(scores) <= interval.high <= 1


@given(SCORES)
@settings(max_examples=60)
def test_interval_mirrors_when_the_systems_swap(scores: list[float]) -> None:
    one, other = mean_interval(scores, replicates=300), mean_interval([1 - score for score in scores], replicates=300)
    assert abs(other.low - (1 - one.high)) < 1e-9
    assert abs(other.high - (1 - one.low)) < 1e-9


@given(SCORES, st.integers(2, 4))
@settings(max_examples=60)
def test_duplicated_judgements_do_not_shrink_the_interval(scores: list[float], times: int) -> None:
    clusters = list(range(len(scores)))
    once = mean_by_cluster(scores, clusters)
    again = mean_by_cluster(scores * times, clusters * times)
    assert mean_interval(again, replicates=300) == mean_interval(once, replicates=300)
    error, repeated = clustered_standard_error(scores, clusters), clustered_standard_error(scores * times, clusters * times)
    assert abs(error - repeated) < 1e-9
    # rows taken for units, as an arena that repeats strong verdicts does, would shrink it
    if len(set(scores)) > 1 and len(scores) >= 20:
        assert mean_interval(scores * times, replicates=300).width < mean_interval(once, replicates=300).width


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_holds_its_rate_and_narrows(successes: int, trials: int) -> None:
    assume(successes <= trials)
    one, more = wilson(successes, trials), wilson(10 * successes, 10 * trials)
    assert one.contains(successes / trials)
    assert more.width < one.width


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-400, 400)), min_size=10, max_size=60))
@settings(max_examples=40)
def test_length_control_is_symmetric(rows: list[tuple[float, int]]) -> None:
    scores, lengths = np.array([row[0] for row in rows]), np.array([float(row[1]) for row in rows])
    one, other = length_control(scores, lengths, replicates=60), length_control(1 - scores, -lengths, replicates=60)
    assert one.is_identified == other.is_identified
    if one.rate is not None and other.rate is not None:
        assert abs(one.rate + other.rate - 1) < 1e-9
        assert one.interval is not None
        assert 0 <= one.interval.low <= one.interval.high <= 1


@given(st.integers(0, 60), st.integers(0, 60))
def test_sign_test_is_a_probability_and_symmetric(wins: int, losses: int) -> None:
    assert 0 < sign_test(wins, losses) <= 1
    assert sign_test(wins, losses) == sign_test(losses, wins)


@given(st.floats(0.02, 0.3), st.floats(0, 0.6))
def test_more_ties_need_fewer_prompts_and_power_round_trips(delta: float, ties: float) -> None:
    assume(delta < (1 - ties) ** 0.5 / 2)
    needed = prompts_needed(delta, tie_share=ties)
    assert needed <= prompts_needed(delta)
    assert detectable_effect(needed, tie_share=ties) >= delta * 0.9  # the MDE formula takes the larger variance

"""Length control: the truth of a simulation, an oracle, symmetry, and what cannot be identified."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from preftune.statistics.length_control import length_control


def simulated(theta: float, phi: float, size: int = 805, shift: float = 150.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Binary results that depend on the model (theta) and on who wrote more (phi)."""
    rng = np.random.default_rng(seed)
    lengths = rng.normal(shift, 250, size)
    x = np.tanh(lengths / lengths.std(ddof=1))
    return (rng.random(size) < expit(theta + phi * x)).astype(float), lengths


def test_finds_the_rate_at_equal_length() -> None:
    scores, lengths = simulated(theta=-0.2, phi=1.5)
    result = length_control(scores, lengths)
    assert result.rate is not None
    assert result.interval is not None
    assert scores.mean() > 0.55  # raw: the longer text wins
    assert result.rate == pytest.approx(expit(-0.2), abs=0.05)
    assert result.interval.contains(float(expit(-0.2)))
    assert result.phi == pytest.approx(1.5, abs=0.35)


def test_equals_a_general_optimiser() -> None:
    scores, lengths = simulated(theta=0.4, phi=0.8, size=120)
    x = np.tanh(lengths / lengths.std(ddof=1))

    def objective(parameters: np.ndarray) -> float:
        q = expit(parameters[0] + parameters[1] * x)
        likelihood = scores * np.log(q) + (1 - scores) * np.log(1 - q)
        return float(-likelihood.sum() + 0.5 * 0.7 * (parameters**2).sum())

    best = minimize(objective, np.zeros(2), tol=1e-12).x
    result = length_control(scores, lengths, ridge=0.7, replicates=10)
    assert (result.rate, result.phi) == pytest.approx((expit(best[0]), best[1]), abs=1e-6)


def test_equals_statsmodels_without_a_penalty() -> None:
    sm = pytest.importorskip("statsmodels.api")
    scores, lengths = simulated(theta=-0.2, phi=1.5)
    x = np.tanh(lengths / lengths.std(ddof=1))
    fit = sm.GLM(scores, np.column_stack([np.ones_like(x), x]), family=sm.families.Binomial()).fit()
    result = length_control(scores, lengths, ridge=1e-9, replicates=10)
    assert (result.rate, result.phi) == pytest.approx((expit(fit.params[0]), fit.params[1]), abs=1e-6)


def test_soft_scores_are_taken_as_they_are() -> None:
    rng = np.random.default_rng(2)
    lengths = rng.normal(0, 10, 400)
    x = np.tanh(lengths / lengths.std(ddof=1))
    result = length_control(expit(0.3 + 0.9 * x), lengths, ridge=1e-9, replicates=10)
    assert (result.rate, result.phi) == pytest.approx((expit(0.3), 0.9), abs=1e-5)


def test_swapping_the_systems_mirrors_rate_and_interval() -> None:
    scores, lengths = simulated(theta=0.9, phi=0.5, size=150)
    one, other = length_control(scores, lengths), length_control(1 - scores, -lengths)
    assert one.rate is not None
    assert one.interval is not None
    assert other.interval is not None
    assert other.rate == pytest.approx(1 - one.rate, abs=1e-9)
    assert other.interval.low == pytest.approx(1 - one.interval.high, abs=1e-9)
    assert other.interval.high == pytest.approx(1 - one.interval.low, abs=1e-9)
    assert other.phi == pytest.approx(one.phi, abs=1e-9)


def test_a_judge_that_only_sees_length_is_controlled_away() -> None:
    rng = np.random.default_rng(5)
    lengths = rng.normal(60, 100, 400)
    scores = (lengths > 0).astype(float)
    result = length_control(scores, lengths)
    assert scores.mean() > 0.65
    assert result.rate == pytest.approx(0.5, abs=0.06)
    assert result.phi is not None
    assert result.phi > 3


@pytest.mark.parametrize(
    ("scores", "lengths", "reason"),
    [
        ([1.0, 0.0] * 50, list(range(1, 101)), "no shorter"),
        ([1.0, 0.0] * 50, list(range(-100, 0)), "no longer"),
        ([1.0, 0.0] * 50, [0] * 100, "no shorter|no longer"),
        ([1.0] * 100, list(range(-50, 50)), "same result"),
        ([1.0, 0.0] * 3, [-1, 1] * 3, "fewer than 10"),
        ([1.0, 0.0] * 500, [1e6, -1e6] + [0.0] * 998, "lengths hardly differ"),
    ],
)
def test_a_reason_instead_of_a_number(scores: list[float], lengths: list[float], reason: str) -> None:
    result = length_control(scores, lengths)
    assert not result.is_identified
    assert (result.rate, result.interval, result.phi) == (None, None, None)
    assert any(part in result.reason for part in reason.split("|"))
    assert result.ridge == 0.1


def test_the_ridge_keeps_a_separated_fit_finite() -> None:
    lengths = np.linspace(-1, 1, 60)
    scores = (lengths > 0.5).astype(float)
    weak, strong = (length_control(scores, lengths, ridge=ridge, replicates=50) for ridge in (0.1, 10.0))
    assert weak.phi is not None
    assert strong.phi is not None
    assert np.isfinite(weak.phi)
    assert 0 < strong.phi < weak.phi


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
def test_interval_covers(rate: float) -> None:
    theta, hits = float(np.log(rate / (1 - rate))), 0
    for seed in range(120):
        result = length_control(*simulated(theta, 0.8, size=100, shift=80, seed=seed), replicates=250)
        # not identified where every prompt is won: the raw interval then speaks alone
        hits += result.interval is None or result.interval.contains(rate)
    assert hits >= 0.89 * 120  # nominal .95, three standard errors of .02 below


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one size"):
        length_control([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="ridge"):
        length_control([1.0, 0.0], [1.0, 2.0], ridge=0.0)

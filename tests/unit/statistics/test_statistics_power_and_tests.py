"""Power against its published table and a simulation; paired tests against statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest
from statsmodels.stats.contingency_tables import mcnemar

from preftune.statistics.paired import sign_flip, sign_test
from preftune.statistics.power import detectable_effect, prompts_needed

TABLE = {
    0.02: (4904, 3923, 2941),
    0.03: (2178, 1742, 1306),
    0.05: (783, 626, 469),
    0.08: (305, 243, 182),
    0.10: (194, 155, 116),
}


@pytest.mark.parametrize(("delta", "needed"), TABLE.items())
def test_prompts_needed_is_the_table(delta: float, needed: tuple[int, int, int]) -> None:
    assert tuple(prompts_needed(delta, tie_share=t) for t in (0.0, 0.2, 0.4)) == needed


def test_so_many_prompts_have_the_power() -> None:
    # W = .55 with 20 % ties: 626 prompts, a two-sided z test at 5 %
    rng = np.random.default_rng(0)
    scores = rng.choice([1.0, 0.5, 0.0], p=[0.45, 0.2, 0.35], size=(4000, 626))
    z = (scores.mean(axis=1) - 0.5) / (scores.std(axis=1, ddof=1) / np.sqrt(626))
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.02)


def test_detectable_effect_golden_value() -> None:
    # (1.959964 + .841621) sqrt(.8 / (4 * 250)) = 2.801585 * .0282843
    assert detectable_effect(250, tie_share=0.2) == pytest.approx(0.079241, abs=1e-5)
    assert detectable_effect(1) == 0.5


@pytest.mark.parametrize("call", [
    lambda: prompts_needed(0.0), lambda: prompts_needed(0.6), lambda: prompts_needed(0.1, tie_share=1.0),
    lambda: detectable_effect(0), lambda: detectable_effect(10, tie_share=-0.1),
])  # fmt: skip
def test_impossible_plans_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match="must"):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(("wins", "losses"), [(30, 14), (14, 30), (0, 5), (7, 7), (1, 0), (0, 0)])
def test_sign_test_equals_statsmodels(wins: int, losses: int) -> None:
    if wins + losses:
        assert sign_test(wins, losses) == pytest.approx(mcnemar([[5, wins], [losses, 3]], exact=True).pvalue, abs=1e-12)
    else:
        assert sign_test(0, 0) == 1.0
    with pytest.raises(ValueError, match="negative"):
        sign_test(-1, 2)


def test_sign_test_golden_value() -> None:
    assert sign_test(30, 14) == pytest.approx(0.02263, abs=5e-6)


def test_sign_flip_is_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(1)
    values = [sign_flip(rng.normal(0, 1, 25), flips=400, seed=seed) for seed in range(300)]
    assert kstest(values, "uniform").pvalue > 0.01


def test_sign_flip_sees_a_difference_and_equals_enumeration() -> None:
    rng = np.random.default_rng(2)
    d = rng.normal(0.8, 1, 10)
    signs = np.array([[1 if code >> bit & 1 else -1 for bit in range(10)] for code in range(1024)])
    exact = (np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean()
    assert sign_flip(d, flips=40_000) == pytest.approx(exact, abs=0.005)
    assert sign_flip([1.0] * 40, flips=999) == 1 / 1000  # never zero: the data are one of their own rearrangements
    with pytest.raises(ValueError, match="at least one"):
        sign_flip([])

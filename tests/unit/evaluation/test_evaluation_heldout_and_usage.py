"""Held-out accuracy by hand, its slices and units; the count of verdict uses under many processes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from preftune.core.errors import InputError
from preftune.evaluation.heldout import PairScores, held_out_accuracy
from preftune.evaluation.usage import USAGE_FILE, count_use, times_used

SCORES = PairScores(
    policy_chosen=[-10.0, -20.0, -30.0, -5.0],
    policy_rejected=[-12.0, -20.0, -28.0, -9.0],
    reference_chosen=[-11.0, -20.0, -30.0, -9.0],
    reference_rejected=[-11.0, -20.0, -30.0, -9.0],
    chosen_tokens=[5, 5, 3, 9],
    rejected_tokens=[3, 5, 5, 4],
    prompts=["p", "q", "r", "s"],
)


def test_accuracy_and_margin_by_hand() -> None:
    # margins .1 x (1 - -1), .1 x 0, .1 x (0 - 2), .1 x (4 - 0) = .2, 0, -.2, .4: right, tie, wrong, right
    result = held_out_accuracy(SCORES, beta=0.1)
    assert result.whole.accuracy == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert result.whole.margin == pytest.approx(0.1)
    assert {one.name: (one.num_pairs, one.accuracy) for one in result.slices} == {
        "chosen is longer": (2, 1.0),
        "equally long": (1, 0.5),
        "chosen is shorter": (1, 0.0),
    }
    assert result.whole.interval.contains(result.whole.accuracy)


def test_the_reference_matters() -> None:
    without = PairScores(
        SCORES.policy_chosen,
        SCORES.policy_rejected,
        [0.0] * 4,
        [0.0] * 4,
        SCORES.chosen_tokens,
        SCORES.rejected_tokens,
        SCORES.prompts,
    )
    shifted = PairScores(
        SCORES.policy_chosen,
        SCORES.policy_rejected,
        [0.0] * 4,
        [9.0] * 4,
        SCORES.chosen_tokens,
        SCORES.rejected_tokens,
        SCORES.prompts,
    )
    assert held_out_accuracy(without, beta=0.1).whole.accuracy == 0.625
    assert held_out_accuracy(shifted, beta=0.1).whole.accuracy == 1.0


def test_pairs_of_one_prompt_are_one_unit() -> None:
    columns = [[-1.0, -2.0] * 30, [-2.0, -1.0] * 30, [0.0] * 60, [0.0] * 60]
    apart = held_out_accuracy(PairScores(*columns, [1] * 60, [1] * 60, list(range(60))), beta=1.0)
    together = held_out_accuracy(PairScores(*columns, [1] * 60, [1] * 60, [index // 10 for index in range(60)]), beta=1.0)
    assert apart.whole.accuracy == together.whole.accuracy == 0.5
    assert together.whole.interval.width > apart.whole.interval.width


def test_bad_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        held_out_accuracy(PairScores([], [], [], [], [], [], []), beta=0.1)
    with pytest.raises(ValueError, match="one size"):
        held_out_accuracy(PairScores([1.0], [1.0], [1.0], [1.0], [1, 2], [1], ["p"]), beta=0.1)
    with pytest.raises(ValueError, match="not finite"):
        held_out_accuracy(PairScores([float("nan")], [1.0], [1.0], [1.0], [1], [1], ["p"]), beta=0.1)


def test_every_use_is_counted_once_when_many_count_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:  # each use opens the lock anew, so threads exclude each other as processes do
        list(pool.map(lambda _: count_use(tmp_path, "hash", "run"), range(20)))
    assert times_used(tmp_path, "hash") == 20
    assert count_use(tmp_path, "other", "run-b") == 1
    assert count_use(tmp_path, "hash", "run-b") == 21
    assert json.loads((tmp_path / USAGE_FILE).read_text())["other"]["runs"][0]["run"] == "run-b"


@pytest.mark.parametrize("content", ["", "[1]", '{"hash": {"count": "x", "runs": []}}', '{"hash": 3}', "{"])
def test_a_broken_count_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / USAGE_FILE).write_text(content)
    with pytest.raises(InputError) as raised:
        count_use(tmp_path, "hash", "run")
    assert "\n" not in str(raised.value)
    assert USAGE_FILE in str(raised.value)

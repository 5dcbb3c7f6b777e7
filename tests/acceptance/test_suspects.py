"""Labels that were turned round on purpose are found among the first suspects; the figures are real ones, seeded."""

import json
from pathlib import Path

import numpy as np
import pytest

from preftune.app.recipes import make_recipe
from preftune.app.suspects import find_suspects
from preftune.app.train import train
from preftune.core.errors import UsageError
from preftune.core.files import read_jsonl

PAIRS = Path(__file__).resolve().parents[2] / "src" / "preftune" / "starter" / "pairs.jsonl"
COUNT = 100


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    """A run on the starter's pairs with one label in ten turned round, and the lines that were."""
    folder = tmp_path_factory.mktemp("flipped")
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:COUNT]]
    places = np.random.default_rng(0).choice(COUNT, COUNT // 10, replace=False).tolist()
    for place in places:
        rows[place]["chosen"], rows[place]["rejected"] = rows[place]["rejected"], rows[place]["chosen"]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = make_recipe({
        "model": "starter", "method": "dpo", "beta": 0.1, "lr": 5e-4, "adapter": "full", "data": str(path), "epochs": 2,
        "pairs_per_step": 8, "probe": False, "checkpoints": 0, "output": str(folder / "runs"),
    })  # fmt: skip
    return train(recipe).run, {place + 1 for place in places}, path


@pytest.mark.slow
def test_turned_labels_are_enriched_among_the_suspects(flipped):
    run, lines, path = flipped
    found = find_suspects(str(run), run.parent, top=len(lines))
    hits = [row for row in found.rows if row.line in lines]
    precision, chance = len(hits) / len(found.rows), len(lines) / COUNT
    print(f"precision at {len(found.rows)}: {precision:.2f}, chance {chance:.2f}")
    assert precision >= 4 * chance
    assert found.num_pairs == COUNT
    first = found.rows[0]
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[first.line - 1])
    assert row["chosen"][0]["content"].startswith(first.chosen[:40])
    assert row["rejected"][0]["content"].startswith(first.rejected[:40])
    assert not first.note
    assert len(first.margins) == 2
    assert f"{path}:{first.line}" in "\n".join(found.summary())
    deviations = [row.deviation for row in found.rows]
    assert deviations == sorted(deviations)


@pytest.mark.slow
def test_the_other_end_of_the_list_is_clean(flipped):
    run, lines, _ = flipped
    found = find_suspects(str(run), run.parent, top=COUNT)
    assert {row.line for row in found.rows} == set(range(1, COUNT + 1))
    assert not [row.line for row in found.rows[-4 * len(lines) :] if row.line in lines]


@pytest.mark.slow
def test_a_margin_is_that_before_its_own_update(flipped):
    run, _, _ = flipped
    rows = read_jsonl(run / "stages" / "1-dpo" / "ledger.jsonl")
    assert all(abs(pair[3]) < 1e-4 for pair in rows[1]["pairs"]), "nothing has been learnt before the first step"
    metrics = [row for row in read_jsonl(run / "stages" / "1-dpo" / "metrics.jsonl") if "loss" in row]
    for row, of_step in zip(rows[1:], metrics, strict=True):
        assert np.mean([pair[3] for pair in row["pairs"]]) == pytest.approx(of_step["rewards/margins"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_file_that_changed_or_went_is_said(flipped):
    run, _, path = flipped
    whole = path.read_text(encoding="utf-8")
    worst = find_suspects(str(run), run.parent, top=1).rows[0].line
    try:
        lines = whole.splitlines(keepends=True)
        row = json.loads(lines[worst - 1])
        row["chosen"][0]["content"] += " And then?"
        path.write_text("".join([*lines[: worst - 1], json.dumps(row) + "\n", *lines[worst:]]), encoding="utf-8")
        assert find_suspects(str(run), run.parent, top=1).rows[0].note == "the row has changed since it was trained on"
        path.unlink()
        gone = find_suspects(str(run), run.parent, top=1).rows[0]
        assert "cannot be shown" in gone.note
        assert gone.line == worst
    finally:
        path.write_text(whole, encoding="utf-8")


def test_a_run_without_pairs_says_so(tmp_path):
    with pytest.raises(UsageError, match="no run 'nothing'"):
        find_suspects("nothing", tmp_path)

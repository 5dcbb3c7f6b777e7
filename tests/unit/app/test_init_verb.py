"""init with files of the user's own: the format is recognised and the settings follow what the rows are."""

import json

import pytest

from preftune.app.init import init
from preftune.app.recipes import load_recipe
from preftune.core.errors import InputError, UsageError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count, extra=""):
    return [
        {"prompt": f"Question {n} of {n * 7}?", "chosen": f"Answer {n}{extra}", "rejected": f"Reply {n}"} for n in range(count)
    ]


def test_pairs_of_ones_own(tmp_path):
    started = init(tmp_path / "a", write(tmp_path / "p.jsonl", pairs(60)), "starter")
    recipe = load_recipe(tmp_path / "a" / "recipe.yaml")
    assert [stage.method for stage in recipe.stages] == ["dpo"]
    rows = [json.loads(line) for line in (tmp_path / "a" / "pairs.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["prompt"][0]["content"] for line in (tmp_path / "a" / "prompts.jsonl").read_text().splitlines()]
    assert 50 <= len(rows) < 60
    assert len(rows) + len(prompts) == 60
    assert not {row["prompt"] for row in rows} & set(prompts), "what is judged is not trained on"
    assert started.commands[0].endswith("preftune check pairs.jsonl")


def test_lopsided_lengths_divide_by_length(tmp_path):
    init(tmp_path / "a", write(tmp_path / "p.jsonl", pairs(60, " and a good deal more")), "starter")
    (stage,) = load_recipe(tmp_path / "a" / "recipe.yaml").stages
    assert stage.loss == {"length_normalised": True, "beta": 5}


def test_without_a_model_sft_comes_first(tmp_path):
    init(tmp_path / "a", write(tmp_path / "p.jsonl", pairs(30)))
    assert [stage.method for stage in load_recipe(tmp_path / "a" / "recipe.yaml").stages] == ["sft", "dpo"]


def test_demonstrations(tmp_path):
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}"} for n in range(30)]
    init(tmp_path / "a", write(tmp_path / "p.jsonl", rows))
    (stage,) = load_recipe(tmp_path / "a" / "recipe.yaml").stages
    assert (stage.method, stage.loss) == ("sft", {})


def test_nothing_is_overwritten_and_too_few_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="5 good rows are too few"):
        init(tmp_path / "a", write(tmp_path / "p.jsonl", pairs(5)))
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "judge.yaml").write_text("mine")
    with pytest.raises(UsageError, match="never overwrites"):
        init(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["judge.yaml"]

"""The grid of a sweep: its points, what they share, and what is refused."""

import pytest

from preftune.app.sweep import make_grid
from preftune.core.errors import PreftuneError, RecipeError

TWO_STAGES = """
model: starter
stages:
  - {name: sft, method: sft, data: sft.jsonl}
  - {name: dpo, method: dpo, beta: 0.1, data: pairs.jsonl}
evaluation: {prompts: p.jsonl, judge: j.yaml}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(TWO_STAGES, encoding="utf-8")
    return path


def test_a_grid_is_the_product_of_its_axes(path):
    grid = make_grid(path, ["stages.1.beta=0.05,0.1", "stages.1.lr=1e-5,1e-4,1e-3"])
    assert [settings for settings, _ in grid.points] == [
        {"stages.1.beta": beta, "stages.1.lr": lr} for beta in (0.05, 0.1) for lr in (1e-5, 1e-4, 1e-3)
    ]
    for settings, recipe in grid.points:
        assert recipe.stages[1].loss["beta"] == settings["stages.1.beta"]
        assert recipe.stages[1].lr == settings["stages.1.lr"]


@pytest.mark.parametrize(
    ("axes", "shared"),
    [
        (["stages.1.beta=0.05,0.1"], 1),
        (["stages.0.lr=1e-4,1e-3"], 0),
        (["seed=1,2"], 0),
        (["evaluation.decoding.temperature=0.5,1"], 1),  # the last stage is each point's own
    ],
)
def test_leading_stages_are_shared_while_nothing_differs(path, axes, shared):
    assert make_grid(path, axes).num_shared == shared


def test_pairs_are_made_by_the_point_that_trains_on_them(path):
    text = """
model: starter
rounds: 2
stages:
  - {method: sft, data: pairs.jsonl}
  - {method: generate, prompts: pairs.jsonl, judge: judge.yaml}
  - {method: dpo}
evaluation: {prompts: prompts.jsonl, judge: judge.yaml}
"""
    path.write_text(text, encoding="utf-8")
    assert make_grid(path, ["stages.2.lr=1e-6,1e-5"]).num_shared == 1
    assert make_grid(path, ["evaluation.decoding.temperature=0.5,1"]).num_shared == 3, "the first round, not half of the second"


def test_the_recipe_may_hold_the_grid(path):
    path.write_text(TWO_STAGES + "sweep: {stages.1.beta: [0.05, 0.5]}\n", encoding="utf-8")
    assert len(make_grid(path, []).points) == 2
    assert len(make_grid(path, ["seed=1,2,3"]).points) == 3  # the command line goes before


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([], "nothing to sweep"),
        (["beta"], "write KEY=VALUE,VALUE"),
        (["beta="], "beta has no values"),
        (["beta=0.1,0.1"], "has a value twice"),
        (["beta=0.1,0.2"], "are the same recipe"),  # the stage's own beta wins
        (["stages.1.betta=0.1,0.2"], "unknown key 'stages.1.betta'"),
        (["stages.1.beta=-1,0.2"], "beta"),
        (["seed=" + ",".join(map(str, range(300)))], "at most 256"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(path, axes, message):
    with pytest.raises(PreftuneError, match=message):
        make_grid(path, axes)


def test_an_evaluation_is_needed(path):
    path.write_text(TWO_STAGES.partition("evaluation")[0], encoding="utf-8")
    with pytest.raises(RecipeError, match="evaluation is missing"):
        make_grid(path, ["stages.1.beta=0.1,0.2"])

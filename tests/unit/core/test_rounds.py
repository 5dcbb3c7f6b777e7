"""Generate stages in recipes: their keys, the data behind them, and rounds written out."""

import pytest

from preftune.app.recipes import load_recipe, make_recipe, save_recipe
from preftune.core.errors import RecipeError

MAKE = {"method": "generate", "prompts": "p.jsonl", "judge": "j.yaml"}


def recipe(stages, **keys):
    return make_recipe({"model": "starter", "stages": stages, **keys})


def test_the_keys_of_a_generate_stage_stand_beside_its_method(tmp_path):
    short = make_recipe({"model": "starter", **MAKE, "samples": 8, "guards": {"min_margin": 1}}, tmp_path)
    nested = {**MAKE, "generate": {"samples": 8, "guards": {"min_margin": 1}}}
    long = make_recipe({"model": "starter", "stages": [nested]}, tmp_path)
    assert short.stages == long.stages
    assert short.stages[0].generate.prompts == str(tmp_path / "p.jsonl")


def test_the_stage_behind_trains_on_what_was_made():
    assert recipe([MAKE, {"method": "dpo"}]).stages[1].data.train == ("previous",)
    mixed = recipe([MAKE, {"method": "dpo", "data": {"train": ["previous", "/more.jsonl"], "select": 0.1}}]).stages[1].data
    assert (mixed.train, mixed.select) == (("previous", "/more.jsonl"), 0.1)
    assert recipe([MAKE, {"method": "dpo", "data": {"select": 0.2}}]).stages[1].data.train == ("previous",)
    with pytest.raises(RecipeError, match="no generate stage comes before"):
        recipe([{"method": "dpo", "data": "previous"}])


def test_rounds_repeat_the_stages_from_the_first_generate_stage_on():
    made = recipe([{"method": "sft", "data": "s.jsonl"}, {**MAKE, "from_checkpoint": "org"}, {"method": "dpo"}], rounds=3)
    assert [stage.name for stage in made.stages] == [
        "sft", "generate-r1", "dpo-r1", "generate-r2", "dpo-r2", "generate-r3", "dpo-r3",
    ]  # fmt: skip
    assert [stage.round for stage in made.stages] == [0, 1, 1, 2, 2, 3, 3]
    assert [stage.from_checkpoint for stage in made.stages if stage.kind == "generate"] == ["org", None, None]


def test_prompts_per_round_are_split():
    made = recipe([{**MAKE, "skip": 5}, {"method": "dpo"}], rounds=3, prompts_per_round=40)
    parts = [(stage.generate.skip, stage.generate.limit) for stage in made.stages if stage.generate]
    assert parts == [(5, 40), (45, 40), (85, 40)]


def test_a_resolved_recipe_with_rounds_is_the_same_recipe(tmp_path):
    made = recipe([MAKE, {"method": "dpo", "adapter": {"rank": 2}}], rounds=2, prompts_per_round=4, name="r")
    save_recipe(made, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == made
    with pytest.raises(RecipeError, match="written out already"):
        load_recipe(tmp_path / "recipe.yaml", ["rounds=3"])


@pytest.mark.parametrize(
    ("stages", "keys", "words"),
    [
        ([{"method": "dpo"}], {"rounds": 2}, "no stage has method: generate"),
        ([MAKE, {"method": "dpo", "from_checkpoint": "org"}], {"rounds": 2}, "inside rounds"),
        ([{**MAKE, "lr": 1e-4}], {}, "trains nothing"),
        ([{**MAKE, "sampels": 3}], {}, "did you mean 'samples'"),
        ([{**MAKE, "guards": {"min_margn": 3}}], {}, "did you mean 'min_margin'"),
        ([{"method": "generate", "prompts": "p"}], {}, "judge is missing"),
        ([MAKE], {"rounds": 0}, "rounds"),
        ([MAKE], {"prompts_per_round": "x"}, "limit|prompts_per_round"),
    ],
)
def test_what_makes_no_sense_is_refused(stages, keys, words):
    with pytest.raises(RecipeError, match=words):
        recipe(stages, **keys)


def test_defaults_for_training_do_not_disturb_a_generate_stage():
    made = recipe([MAKE, {"method": "dpo"}], lr=1e-4, beta=0.3, adapter="full")
    assert (made.stages[0].lr, made.stages[1].lr, made.stages[1].loss["beta"]) == (None, 1e-4, 0.3)

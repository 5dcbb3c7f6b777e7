"""The recipe: short and long form agree, unknown keys are refused with the right suggestion."""

import pytest

from preftune.core.errors import RecipeError
from preftune.core.recipe import build_recipe

OPTIONS = {"sft": [], "dpo": ["beta", "label_smoothing", "length_normalised", "rpo_alpha"]}


def build(given):
    return build_recipe(given, OPTIONS)


def test_the_short_form_is_one_stage():
    short = build({"model": "m", "method": "dpo", "beta": 0.2, "data": "pairs.jsonl", "epochs": 2})
    long = build(
        {
            "model": {"name": "m"},
            "stages": [{"method": "dpo", "loss": {"beta": 0.2}, "data": {"train": ["pairs.jsonl"]}, "epochs": 2}],
        }
    )
    assert short == long
    assert short.stages[0].name == "dpo"


def test_top_level_stage_keys_are_defaults_and_the_stage_wins():
    recipe = build(
        {"model": "m", "lr": 1e-3, "beta": 0.3, "data": "a", "stages": [{"method": "sft", "lr": 1e-4}, {"method": "dpo"}]}
    )
    sft, dpo = recipe.stages
    assert (sft.lr, dpo.lr) == (1e-4, 1e-3)
    assert (sft.loss, dpo.loss) == ({}, {"beta": 0.3})
    assert dpo.data is not None
    assert dpo.data.train == ("a",)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "m", "method": "dpo", "betta": 0.1}, "unknown key 'betta': did you mean 'beta'"),
        ({"model": "m", "stages": [{"method": "dpo", "epoch": 1}]}, "'stages.0.epoch': did you mean 'epochs'"),
        ({"model": "m", "method": "dppo"}, "no loss 'dppo': did you mean 'dpo'"),
        ({"model": "m", "method": "sft", "beta": 0.1}, "loss 'sft' has no option 'beta'"),
        ({"model": {"nam": "m"}, "method": "dpo"}, "'model.nam': did you mean 'name'"),
        ({"model": "m", "method": "dpo", "data": {"trian": "x"}}, "data.trian': did you mean 'train'"),
        ({"model": "m", "method": "dpo", "lora": {"rnk": 3}}, "lora.rnk': did you mean 'rank'"),
        ({"model": "m", "method": "dpo", "loss": {"bta": 3}}, "no option 'bta': did you mean 'beta'"),
        (
            {"model": "m", "method": "dpo", "adapter": {"rank": 3}, "lora": {"alpha": 3}},
            "adapter: the options of LoRA stand here and",
        ),
        ({"model": "m", "method": "dpo", "epochs": -1}, "epochs: write a number above 0, got -1"),
        (
            {"model": "m", "evaluation": {"prompts": "p", "judge": "j", "decodng": {}}},
            "evaluation.decodng': did you mean 'decoding'",
        ),
        ({"method": "dpo"}, "model is missing"),
        ({"model": "m", "stages": []}, "stages is empty"),
        ({"model": "m", "stages": [{"name": "a/b"}]}, "stage name 'a/b'"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(given, words):
    with pytest.raises(RecipeError) as caught:
        build(given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_survives_its_own_dump():
    recipe = build({"model": "m", "method": "dpo", "beta": 0.2, "data": "x", "adapter": {"rank": 4}})
    assert recipe.stages[0].lora.rank == 4
    assert build(recipe.model_dump(mode="json")) == recipe

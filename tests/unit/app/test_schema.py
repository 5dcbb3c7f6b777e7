"""The schemas accept what preftune accepts, and refuse what it refuses."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from preftune.app.init import init
from preftune.app.recipes import make_recipe, read_mapping
from preftune.app.schema import SCHEMAS, schema_of
from preftune.core.errors import PreftuneError, UnknownName
from preftune.data.dataset import example_to_json
from preftune.data.pipeline import read_examples

ROOT = Path(__file__).resolve().parents[3]
STARTER = ROOT / "src" / "preftune" / "starter"
RECIPE = Draft202012Validator(schema_of("recipe"))


def written(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_schema_is_one(kind):
    Draft202012Validator.check_schema(schema_of(kind))


def test_an_unknown_kind():
    with pytest.raises(UnknownName, match="did you mean 'recipe'"):
        schema_of("recipes")


@pytest.mark.parametrize(
    "path", [STARTER / "recipe.yaml", *sorted((ROOT / "recipes").glob("**/*.yaml"))], ids=lambda path: path.stem
)
def test_shipped_recipes_are_valid(path):
    RECIPE.validate(written(read_mapping(path)))


def test_what_init_writes_and_what_a_run_keeps_is_valid(tmp_path):
    from preftune.app.recipes import load_recipe, save_recipe

    init(tmp_path / "mine")
    RECIPE.validate(written(read_mapping(tmp_path / "mine" / "recipe.yaml")))
    save_recipe(load_recipe(tmp_path / "mine" / "recipe.yaml"), tmp_path / "resolved.yaml")
    RECIPE.validate(written(read_mapping(tmp_path / "resolved.yaml")))


GOOD = [
    {"model": "starter", "method": "dpo", "beta": 0.1, "data": "pairs.jsonl"},
    {"model": {"name": "starter", "dtype": "bfloat16"}, "data": ["a.jsonl", "b.jsonl"], "adapter": {"rank": 8}},
    {"model": "m", "method": "sft", "data": {"train": "a.jsonl", "select": 0.1}, "adapter": "full"},
    {"model": "m", "lr": 1e-4, "beta": 0.2, "stages": [{"method": "sft", "data": "a"}, {"method": "dpo", "beta": 0.1}]},
    {"model": "m", "method": "dpo", "loss": {"beta": 0.1, "label_smoothing": 0.1}},
    {
        "model": "m",
        "evaluation": {"prompts": "p.jsonl", "judge": {"name": "rules", "rules": [{"kind": "complete", "weight": 1}]}},
    },
]
BAD = [
    {"method": "dpo"},
    {"model": "m", "betta": 0.1},
    {"model": "m", "method": "dpo", "beta": -1},
    {"model": "m", "method": "dpo", "beta": "much"},
    {"model": "m", "method": "sft", "beta": 0.1},
    {"model": "m", "method": "nonsense"},
    {"model": "m", "method": "dpo", "loss": {"betta": 0.1}},
    {"model": "m", "stages": [{"method": "sft", "beta": 0.1}]},
    {"model": "m", "stages": []},
    {"model": "m", "pairs_per_step": 0},
    {"model": "m", "data": {"train": "a", "selct": 0.1}},
    {"model": "m", "adapter": {"rnk": 8}},
]


@pytest.mark.parametrize("recipe", GOOD)
def test_good_recipes(recipe):
    make_recipe(recipe)
    RECIPE.validate(recipe)


@pytest.mark.parametrize("recipe", BAD)
def test_bad_recipes_are_refused_by_both(recipe):
    with pytest.raises(PreftuneError):
        make_recipe(recipe)
    assert not RECIPE.is_valid(recipe)


def test_every_option_of_every_loss_is_in_the_schema():
    from preftune.app.recipes import loss_options

    for method, options in loss_options().items():
        text = json.dumps(schema_of("recipe"))
        assert all(f'"{option}"' in text for option in options), method


@pytest.mark.parametrize("name", ["pairs.jsonl", "sft.jsonl"])
def test_examples(name):
    validator = Draft202012Validator(schema_of("example"))
    rows = [written(example_to_json(one)) for one in read_examples([str(STARTER / name)], limit=20).examples]
    for row in rows:
        validator.validate(row)
    assert not validator.is_valid({**rows[0], "judgement": {"kind": "Preference", "preferred": "third"}})
    assert not validator.is_valid({**rows[0], "more": 1})


def test_judges():
    validator = Draft202012Validator(schema_of("judge"))
    for name in ("judge_pairs.yaml", "judge_verdict.yaml"):
        validator.validate(yaml.safe_load((STARTER / name).read_text(encoding="utf-8")))
    assert not validator.is_valid({"name": "rules", "rules": []})
    assert not validator.is_valid({"name": "rules", "rules": [{"kind": "complete"}], "tie_margn": 1})
    assert not validator.is_valid({"name": "oracle"})

"""Recipe files: YAML in, overrides, absolute paths, one resolved file that runs again."""

import pytest

from preftune.app.recipes import load_recipe, make_recipe, recipe_digest, save_recipe
from preftune.core.errors import InputError, RecipeError


@pytest.fixture
def write(tmp_path):
    def make(text, name="r.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return make


def test_paths_are_relative_to_the_file_and_the_starter_stays(write, tmp_path):
    recipe = load_recipe(write("model: starter\nmethod: dpo\ndata: {train: a.jsonl, select: b.jsonl}\n"))
    assert recipe.model.name == "starter"
    assert recipe.name == "r"
    assert recipe.stages[0].data.train == (str(tmp_path / "a.jsonl"),)
    assert recipe.stages[0].data.select == str(tmp_path / "b.jsonl")


def test_a_hub_id_stays_and_a_folder_becomes_absolute(write, tmp_path):
    (tmp_path / "mine").mkdir()
    assert load_recipe(write("model: org/name\nmethod: dpo\n")).model.name == "org/name"
    assert load_recipe(write("model: mine\nmethod: dpo\n")).model.name == str(tmp_path / "mine")


def test_numbers_such_as_1e_minus_4_are_numbers(write):
    assert load_recipe(write("model: starter\nmethod: dpo\nlr: 1e-4\n")).stages[0].lr == 1e-4


def test_overrides_reach_every_depth(write):
    path = write("model: starter\nstages:\n  - {method: sft}\n  - {method: dpo, data: x.jsonl}\n")
    overrides = [
        "seed=7",
        "stages.1.beta=0.3",
        "stages.1.data.select=0.1",
        "model.dtype=float32",
        "evaluation.prompts=p",
        "evaluation.judge=j",
    ]
    recipe = load_recipe(path, overrides)
    assert (recipe.seed, recipe.stages[1].loss["beta"], recipe.stages[1].data.select) == (7, 0.3, 0.1)
    assert (recipe.model.name, recipe.model.dtype) == ("starter", "float32")
    for wrong in ("seed", "stages.5.lr=1", "stages.lr=1"):
        with pytest.raises(RecipeError):
            load_recipe(path, [wrong])


def test_a_key_given_twice_is_refused(write):
    with pytest.raises(InputError, match=r"line 3.*'beta' is given twice"):
        load_recipe(write("model: starter\nbeta: 0.1\nbeta: 0.2\n"))


def test_yaml_runs_no_code(write):
    with pytest.raises(InputError, match="not YAML"):
        load_recipe(write("model: !!python/object/apply:os.system ['echo']\n"))


def test_a_resolved_recipe_is_the_same_recipe(write, tmp_path):
    recipe = load_recipe(write("model: starter\nmethod: dpo\nbeta: 0.25\ndata: x.jsonl\nadapter: {rank: 4}\n"))
    save_recipe(recipe, tmp_path / "elsewhere" / "recipe.yaml")
    assert load_recipe(tmp_path / "elsewhere" / "recipe.yaml") == recipe


def test_file_and_python_are_the_same_thing(write, tmp_path):
    given = {"model": "starter", "method": "dpo", "beta": 0.2, "data": "x.jsonl", "name": "r"}
    assert make_recipe(given, tmp_path) == load_recipe(write("model: starter\nmethod: dpo\nbeta: 0.2\ndata: x.jsonl\n"))


def test_the_digest_ignores_where_a_run_goes(write):
    recipe = load_recipe(write("model: starter\nmethod: dpo\n"))
    moved = recipe.model_copy(update={"output": "elsewhere"})
    assert recipe_digest(recipe, recipe.stages[0]) == recipe_digest(moved, moved.stages[0])
    other = load_recipe(write("model: starter\nmethod: dpo\nbeta: 0.2\n"))
    assert recipe_digest(recipe, recipe.stages[0]) != recipe_digest(other, other.stages[0])


def test_paths_on_the_command_line_are_relative_to_where_it_was_typed(write, tmp_path, monkeypatch):
    path = write("model: starter\nmethod: dpo\ndata: a.jsonl\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    data = load_recipe(path, ["data.select=b.jsonl"]).stages[0].data
    assert data.train == (str(tmp_path / "a.jsonl"),)
    assert data.select == str(elsewhere / "b.jsonl")

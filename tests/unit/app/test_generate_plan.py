"""What plan says of generate stages and rounds before any pair is made, each finding beside a recipe without it."""

import json

import pytest

from preftune.app.context import Context
from preftune.app.fix import propose
from preftune.app.plan import plan
from preftune.app.recipes import make_recipe
from preftune.app.train import train
from preftune.core.errors import Blocked, PreftuneError

PAIRS_JUDGE = {"name": "rules", "rules": [{"kind": "lexicon", "name": "a", "words": ["glad"], "weight": 1.0}]}
OTHER_JUDGE = {"name": "rules", "rules": [{"kind": "lexicon", "name": "b", "words": ["merry"], "weight": 1.0}]}
PROMPTS = [f"Tell a story about {one}." for one in ("a cat", "two dogs", "the moon", "my red hat", "some old king", "a tiny fox")]


@pytest.fixture
def made(tmp_path):
    def write(name, prompts):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts), encoding="utf-8")
        return str(path)

    def go(prompts=PROMPTS, verdict=("Say something about ships and snow.",), judge=OTHER_JUDGE, stage=None, **keys):
        maker = {"method": "generate", "prompts": write("p.jsonl", prompts), "judge": PAIRS_JUDGE, **(stage or {})}
        evaluation = {"prompts": write("v.jsonl", verdict), "judge": judge}
        given = {"model": "starter", "stages": [maker, {"method": "dpo", "lr": 1e-6}], "evaluation": evaluation, **keys}
        return plan(make_recipe({**given, "output": str(tmp_path / "runs")}, tmp_path))

    return go


def blockers(made):
    return {one.code: one.fact for one in made.blockers}


def test_nothing_stands_in_the_way_of_a_sound_one(made):
    plan_made = made(rounds=2, prompts_per_round=3)
    assert blockers(plan_made) == {}
    text = "\n".join(plan_made.summary())
    assert "stage generate-r2: 4 samples of each of 3 prompts" in text
    assert "stage dpo-r2: dpo, lora, on the pairs that the stage before makes" in text
    json.dumps(plan_made.to_dict())


def test_a_prompt_of_the_verdict_set_blocks(made):
    found = blockers(made(verdict=("Ships?", PROMPTS[2].upper())))
    assert "1 of the verdict prompts are also in stage 1's training data" in found["leakage"]


def test_the_judge_of_the_pairs_may_not_judge_the_result(made):
    assert "is the one that made the pairs" in blockers(made(judge=PAIRS_JUDGE))["judge_not_independent"]


def test_too_few_prompts_for_the_rounds(made):
    found = blockers(made(rounds=2, prompts_per_round=4))
    assert "generate-r2" in found["too_few_prompts"]
    assert "leaves 2 prompts" in found["too_few_prompts"]
    repeated = blockers(made([*PROMPTS, PROMPTS[0].lower(), PROMPTS[1]], stage={"limit": 7}))
    assert "leaves 6 prompts" in repeated["too_few_prompts"], "prompts that differ in case alone are one"


def test_unreadable_prompts_and_judges(made, tmp_path):
    assert "unreadable_data" in blockers(made(stage={"prompts": str(tmp_path / "none.jsonl")}))
    assert "unreadable_judge" in blockers(made(stage={"judge": str(tmp_path / "none.yaml")}))


def test_temperature_0_makes_no_pairs(made):
    assert "no_variety" in blockers(made(stage={"decoding": {"temperature": 0}}))


def test_a_judge_of_another_kind_of_mistake_is_named(made):
    assert "unreadable_judge" in blockers(made(stage={"judge": {"name": "ruls"}}))


def test_a_stage_that_makes_no_pair_stops_the_run(made, tmp_path):
    decoding = {"max_new_tokens": 4, "batch_size": 8}
    silent = {"name": "rules", "rules": [{"kind": "lexicon", "name": "a", "words": ["xylophone"], "weight": 1.0}]}
    recipe = made(PROMPTS[:2], stage={"judge": silent, "samples": 2, "decoding": decoding}).recipe
    with pytest.raises(Blocked, match=r"nothing_made: .* no pair was made of 4 samples of 2 prompts: .*no_difference"):
        train(recipe, context=Context(tmp_path / "cache", tmp_path / "state"))
    run = next((tmp_path / "runs").iterdir())
    assert (run / "stages/1-generate/record/samples.jsonl").read_text().count("\n") == 4, "the record tells why"
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


def test_a_setting_that_fits_is_not_searched_for_data_that_are_not_there(made):
    with pytest.raises(PreftuneError, match=r"stage generate has no examples before the run makes them"):
        propose(made().recipe, 10**12)


def test_a_judge_of_the_result_that_cannot_be_read_or_pays_for_length(made, tmp_path):
    assert "unreadable_evaluation" in blockers(made(judge=str(tmp_path / "none.yaml")))
    lengthy = {"name": "rules", "rules": [{"kind": "lexicon", "words": ["merry"], "measure": "count", "weight": 1.0}]}
    assert "judge_rewards_length" in {one.code for one in made(judge=lengthy).findings}
    assert "judge_rewards_length" not in {one.code for one in made().findings}

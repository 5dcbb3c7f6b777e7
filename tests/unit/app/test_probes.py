"""Probes: a model that cannot do the task, a run that does not fit, and nothing measured twice."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from preftune.app import fix, probes
from preftune.app.context import Context
from preftune.app.plan import plan, task_of
from preftune.app.recipes import load_recipe, make_recipe
from preftune.app.train import resume_run, train
from preftune.core.errors import Blocked, UsageError
from preftune.core.recipe import ModelConfig, StageConfig
from preftune.modeling import machine
from preftune.training.competence import (
    Competence,
    check_competence,
    choose_examples,
    measure_competence,
    unigram_entropy,
)

ROOT = Path(__file__).resolve().parents[3]
STARTER = ROOT / "src" / "preftune" / "starter"


@pytest.fixture
def place(tmp_path):
    return Context(tmp_path / "cache", tmp_path / "state")


@pytest.fixture
def recipe(tmp_path):
    rows = (STARTER / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:32]
    (tmp_path / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")

    def go(**changes):
        given = {"model": "starter", "data": {"train": "pairs.jsonl", "select": 0.1}, "adapter": "full", "pairs_per_step": 8}
        return make_recipe({**given, "checkpoints": 0, "lr": 1e-6, "output": str(tmp_path / "runs"), **changes}, tmp_path)

    return go


@pytest.fixture
def random_model(tmp_path, starter_model):
    """The starter with weights that know nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "random"
    shutil.copytree(starter_model, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


def measured(name, recipe, **options):
    from preftune.modeling.load import load_model

    loaded = load_model(ModelConfig(name=name), precision="float32")
    examples = plan(recipe).stages[0].train
    return measure_competence(
        loaded.model, choose_examples(examples, 10**6), unigram_entropy(examples), tokenizer=loaded.tokenizer, **options
    )


def test_a_model_that_knows_nothing_may_not_learn_preferences(recipe, random_model, place):
    with pytest.raises(Blocked, match="no better than their token frequencies") as refused:
        train(recipe(model=random_model), context=place)
    assert [one.code for one in refused.value.findings] == ["cannot_do_the_task"]
    assert train(recipe(model=random_model, max_steps=1, warmup=0), context=place, probe="off").stages, "who insists, may"
    assert train(recipe(model=random_model, method="sft", max_steps=1, warmup=0), context=place).stages, "sft is for that"
    assert train(recipe(max_steps=1, warmup=0), context=place).stages


def test_a_refused_run_is_refused_again_until_somebody_insists_and_that_is_kept(recipe, random_model, place, tmp_path):
    refused = recipe(model=random_model, max_steps=1, warmup=0)
    with pytest.raises(Blocked):
        train(refused, context=place, folder=tmp_path / "run")
    with pytest.raises(Blocked, match="no better than their token frequencies"):
        resume_run(str(tmp_path / "run"), context=place)
    assert "not_probed" not in codes(tmp_path / "run")
    assert resume_run(str(tmp_path / "run"), context=place, no_probe=True).stages
    assert codes(tmp_path / "run").count("not_probed") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["is_probed"] is False
    train(refused, context=place, folder=tmp_path / "other", probe="off")
    assert codes(tmp_path / "other").count("not_probed") == 1
    resume_run(str(tmp_path / "other"), context=place)
    assert codes(tmp_path / "other").count("not_probed") == 1, "said once"


def codes(run):
    return [json.loads(line)["code"] for line in (run / "events.jsonl").read_text().splitlines()]


def test_the_environment_switches_it_off(recipe, random_model, place, monkeypatch):
    monkeypatch.setenv("PREFTUNE_PROBE", "off")
    assert train(recipe(model=random_model, max_steps=1, warmup=0), context=place).stages


def test_answers_that_do_not_stop(recipe, random_model):
    dpo = StageConfig(name="dpo")
    knows, knows_not = measured("starter", recipe()), measured(random_model, recipe())
    assert check_competence(dpo, knows) == []
    assert knows.nll < 1 < knows.entropy
    assert knows.num_answers == 16
    findings = {one.code: one for one in check_competence(dpo, knows_not)}
    assert findings["does_not_stop"].fact.startswith("stage dpo: 0 of 16 greedy answers")
    assert "does_not_stop" not in {one.code for one in check_competence(StageConfig(name="s", method="sft"), knows_not)}


def test_the_entropy_of_known_frequencies():
    from preftune.core.records import TokenisedCompletion, TokenisedExample

    ids = tuple(range(4)) * 1000
    one = TokenisedExample("e", (9,), (TokenisedCompletion(ids, (True,) * len(ids)),))
    assert unigram_entropy([one]) == pytest.approx(torch.log(torch.tensor(4.0)).item() + 3 / 8000, abs=1e-6)
    few = TokenisedExample("e", (9,), (TokenisedCompletion(ids[:100], (True,) * 100),))
    assert unigram_entropy([few]) is None
    assert check_competence(StageConfig(name="s"), Competence(9.0, None, 100)) == []


@pytest.fixture
def no_process(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)


def test_a_plan_is_measured_once_and_judged_by_its_limit(recipe, place, monkeypatch):
    made = plan(recipe(), probe="on", context=place)
    assert made.findings == []
    (stage,) = made.probed.stages
    assert 1e8 < stage.prediction.peak_bytes < 4e9
    assert stage.prediction.seconds > 0
    assert any("predicted" in line for line in made.summary())

    def refuse(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    again = plan(recipe(), probe="on", context=place)
    assert again.probed.stages[0].competence == stage.competence
    peak = again.probed.peak_bytes
    blocked = plan(recipe(), probe="on", context=place, memory=peak // 2)
    assert [one.code for one in blocked.blockers] == ["memory"]
    tight = plan(recipe(), probe="on", context=place, memory=int(peak * 1.05))
    assert [one.code for one in tight.findings] == ["memory_tight"]
    assert "long_run" not in {one.code for one in again.findings}
    monkeypatch.setattr(probes, "LONG_RUN_S", 0.001)
    assert "long_run" in {one.code for one in plan(recipe(), probe="on", context=place).findings}
    with pytest.raises(AssertionError, match="a process was started"):
        plan(recipe(pairs_per_step=4), probe="on", context=place)


def test_weights_alone_may_be_too_much(recipe, place, no_process):
    made = plan(recipe(), probe="on", context=place, memory=1_000_000)
    assert [one.code for one in made.blockers] == ["memory"]
    assert "for weights, gradients and optimiser alone" in made.blockers[0].fact


def test_short_runs_and_large_models_are_left_alone(recipe, place, no_process, monkeypatch):
    assert "the run is short" in plan(recipe(), probe="worthwhile", context=place).probed.skipped
    monkeypatch.setitem(probes.SMALL_MODEL, "full", 1000)
    assert "--probe rehearses it all the same" in plan(recipe(), probe="small", context=place).probed.skipped


def test_running_out_of_memory_ends_the_rehearsal_alone(recipe, place, monkeypatch):
    made = plan(recipe())
    limit = machine.MemoryLimit(20_000_000, "test")
    monkeypatch.setattr(machine, "memory_limit", lambda device: limit)
    found = probes.probe(task_of(made, place), "on", None)
    assert [one.code for one in found.findings] == ["out_of_memory"], found.findings
    assert not list((place.cache / "probes").glob("*.json")), "what failed is not kept"


def test_a_rehearsal_that_fails_says_how(recipe, place, tmp_path):
    made = plan(recipe())
    broken = tmp_path / "broken"
    shutil.copytree(STARTER / "model", broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 99}))
    task = task_of(made, place)
    start = task.starts[0].model_copy(update={"name": str(broken)})
    changed = probes.ProbeTask(task.recipe, task.data, [start], task.shapes, place)
    (finding,) = probes.probe(changed, "on", None).findings
    assert (finding.level, finding.code) == ("blocker", "dry_run_failed")
    assert "the model folder is incomplete" in finding.fact


def test_what_fits_is_proposed_and_written(recipe, place, tmp_path, monkeypatch):
    peaks = {"": 900, "tokens_per_pack": 700, "gradient_checkpointing": 600, "model.dtype": 650, "adapter": 300}
    peaks["activation_offloading"] = 550
    monkeypatch.setattr(fix, "_peak", lambda task: peaks[_last(task.recipe)])
    given = recipe(tokens_per_pack=700)
    found = fix.propose(given, 1000, context=place)
    assert (found.fits, found.trials[-1].changes) == (True, {}), "nine tenths of the limit are enough"
    found = fix.propose(given, 700, tmp_path / "fits.yaml", context=place)
    assert set(found.trials[-1].changes) == {"tokens_per_pack", "gradient_checkpointing"}
    (stage,) = load_recipe(tmp_path / "fits.yaml").stages
    assert (stage.gradient_checkpointing, stage.tokens_per_pack < 700) == ("on", True)
    found = fix.propose(given, 620, tmp_path / "offloaded.yaml", context=place)
    assert set(found.trials[-1].changes) == {"tokens_per_pack", "gradient_checkpointing", "activation_offloading"}
    assert load_recipe(tmp_path / "offloaded.yaml").stages[0].activation_offloading == "disk"
    found = fix.propose(given, 400, context=place)
    assert set(found.trials[-1].changes) == {
        "tokens_per_pack",
        "gradient_checkpointing",
        "activation_offloading",
        "adapter",
    }, "bfloat16 did not help"
    found = fix.propose(given, 200, tmp_path / "never.yaml", context=place)
    assert (found.fits, (tmp_path / "never.yaml").exists()) == (False, False)


def _last(recipe):
    """The lever that was pulled last."""
    (stage,) = recipe.stages
    if stage.adapter == "lora":
        return "adapter"
    if stage.activation_offloading != "off":
        return "activation_offloading"
    if recipe.model.dtype == "bfloat16":
        return "model.dtype"
    if stage.gradient_checkpointing == "on":
        return "gradient_checkpointing"
    return "" if stage.tokens_per_pack == 700 else "tokens_per_pack"


@pytest.mark.parametrize("text", ["", "much", "-2GB", "0", "2XB"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="write a size such as 2GB"):
        fix.read_size(text)

"""Early stopping and the best checkpoint: chosen on select, kept through a kill, and what a passed loss or callback may do."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_resume import ROWS, files_of, stop_at
from tiny import make_examples, make_plan

from preftune.app.hooks import Hooks
from preftune.core.errors import Interrupted, UsageError
from preftune.core.events import Noted, StepDone, Stop
from preftune.core.files import read_json, read_jsonl
from preftune.core.recipe import EarlyStoppingConfig, StageConfig
from preftune.maths.losses.dpo import DPO
from preftune.maths.losses.sft import SFT
from preftune.maths.types import LossTerms, Term
from preftune.training.loop import run_stage
from preftune.training.passed import identity_of, passed_loss
from preftune.training.selection import note_evaluation
from preftune.training.state import TrainState

SELECT = make_examples(8, 3, prefix="select")
# random labels: what is learnt of train makes select worse, soon
OVERFIT = {"lr": 1e-2, "epochs": 4.0, "evals": 8, "checkpoints": 3, "keep_checkpoints": 1, "adapter": "full"}


def evals_of(folder):
    return {row["step"]: row["eval_loss"] for row in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in row}


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory, tiny_model):
    work = tmp_path_factory.mktemp("early")
    rule = EarlyStoppingConfig(patience=2)
    result = run_stage(make_plan(work, tiny_model, ROWS, SELECT, keep="best", early_stopping=rule, **OVERFIT))
    return work, result


def test_it_stops_when_select_gets_no_better_and_keeps_the_best(stopped_early, tmp_path, tiny_model):
    work, result = stopped_early
    found = evals_of(work / "run")
    steps = sorted(found)
    best = min(found, key=found.get)
    assert steps[-1] == steps[steps.index(best) + 2] == result.steps < 24, "two evaluations without a gain"
    assert (result.kept_step, result.best_value) == (best, found[best])
    kept = read_json(work / "run" / "result.json")
    assert (kept["kept_step"], kept["best_value"], kept["steps"]) == (best, found[best], result.steps)
    assert "eval_loss has not improved for 2 evaluations" in kept["ended"]
    shorter = {**OVERFIT, "early_stopping": None}
    whole = run_stage(make_plan(tmp_path, tiny_model, ROWS, SELECT, **shorter))
    assert (whole.steps, whole.kept_step, whole.ended) == (24, 24, "")
    assert evals_of(tmp_path / "run")[24] > 1.1 * found[best], "without it the stage ends worse"
    weights = [
        load_file(folder / "model.safetensors")
        for folder in (result.final, work / "run" / "checkpoints" / f"step-{best:06d}" / "model")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("place", ["before the best", "behind the best", "behind one without a gain"])
def test_patience_survives_a_stop(stopped_early, tmp_path, tiny_model, place):
    work, whole = stopped_early
    best = whole.kept_step
    after = {"before the best": best - 1, "behind the best": best + 1, "behind one without a gain": whole.steps - 1}[place]
    assert 0 < after < whole.steps
    settings = {"keep": "best", "early_stopping": EarlyStoppingConfig(patience=2), **OVERFIT}
    with pytest.raises(Interrupted):
        run_stage(make_plan(tmp_path, tiny_model, ROWS, SELECT, **settings), stop_at(after))
    again = run_stage(make_plan(tmp_path, tiny_model, ROWS, SELECT, resume=True, **settings))
    assert (again.steps, again.kept_step, again.best_value, again.ended) == (
        whole.steps,
        whole.kept_step,
        whole.best_value,
        whole.ended,
    )
    assert files_of(tmp_path / "run")["final/model.safetensors"] == files_of(work / "run")["final/model.safetensors"]


def test_the_rule_itself():
    def walk(values, **rule):
        config = StageConfig(name="s", early_stopping=EarlyStoppingConfig(**rule))
        state, name = TrainState(), rule.get("metric", "eval_loss")
        for step, value in enumerate(values, 1):
            state.step = step
            note_evaluation(config, state, {name: value})
            if state.ended:
                break
        return state.step, state.best_step, bool(state.ended)

    assert walk([3, 2, 1, 2, 3]) == (5, 3, True)
    assert walk([3, 2, 1.9, 1.85], min_delta=0.2) == (4, 2, True)
    assert walk([0.5, 0.7, 0.6, 0.65], metric="eval_rewards/accuracies") == (4, 2, True), "a larger accuracy is better"
    assert walk([3, 3, 3]) == (3, 1, True)
    assert walk([3, 3, 3, 3, 3], warmup_evals=1) == (4, 1, True), "the first one after the baseline is not counted"
    assert walk([3, 2, 3, 3, 3], warmup_evals=1) == (4, 2, True), "and can be the best"
    assert walk([-5, -9, -4], metric="eval_logps/chosen", patience=5) == (3, 3, False)


def test_nothing_to_choose_by_is_refused(tmp_path, tiny_model):
    with pytest.raises(
        UsageError, match=r"keep: best needs held-out examples, and data.select holds no examples; set data.select"
    ):
        run_stage(make_plan(tmp_path, tiny_model, ROWS, [], keep="best"))
    with pytest.raises(UsageError, match="sft gives no 'eval_rewards/accuracies' on select; it gives eval_loss"):
        run_stage(
            make_plan(tmp_path, tiny_model, method="sft", loss={}, max_steps=2,
                      early_stopping=EarlyStoppingConfig(metric="eval_rewards/accuracies"))
        )  # fmt: skip


def run_with(work, model, hooks, **changes):
    seen = []
    plan = make_plan(work, model, ROWS, [], **changes)
    import dataclasses

    plan = dataclasses.replace(plan, loss=hooks.loss_for(plan.config), stop_reason=hooks.stop_reason)
    return run_stage(plan, hooks.telling(seen.append)), seen


def test_a_callback_ends_a_stage_well_and_one_that_raises_does_not(tmp_path, tiny_model):
    told = []

    def enough(event):
        told.append(type(event).__name__)
        if isinstance(event, StepDone) and event.step == 3:
            return Stop("three are enough")
        return None

    def broken(event):
        raise ZeroDivisionError("not today")

    result, seen = run_with(tmp_path, tiny_model, Hooks(callbacks=[broken, enough]))
    assert (result.steps, result.ended) == (3, "callback enough: three are enough")
    assert (result.final / "adapter_config.json").is_file()
    notes = [event.message for event in seen if isinstance(event, Noted) and event.code == "callback_failed"]
    assert notes == [f"callback broken failed on {told[0]}: ZeroDivisionError: not today; it is not called again"]


def own(logps):
    chosen, rejected = 0.1 * logps.chosen_logratio, 0.1 * logps.rejected_logratio
    return LossTerms(
        {"loss": Term(-torch.nn.functional.logsigmoid(chosen - rejected), "pair")}, chosen.detach(), rejected.detach()
    )


def test_a_passed_function_trains_as_the_loss_that_it_writes_out(tmp_path, tiny_model):
    run_stage(make_plan(tmp_path, tiny_model, ROWS, [], folder="named", max_steps=4))
    _, _ = run_with(tmp_path, tiny_model, Hooks(own), max_steps=4)
    losses = [
        [row["loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in ("named", "run")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[0]) == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "is no loss: pass an instance"),
        (DPO, "is no loss: pass an instance"),
        (SFT(), "takes demonstrations, and method 'dpo' reads pairs"),
        (lambda logps: logps.policy_chosen, "returns Tensor; return LossTerms"),
        (lambda logps: LossTerms({"loss": Term(logps.policy_chosen / 0, "pair")}), "it must be finite"),
        (lambda logps: LossTerms({"loss": Term(logps.policy_chosen.detach(), "pair")}), "has no gradient"),
        (lambda logps: LossTerms({"loss": Term(logps.policy_chosen, "pair")}), "gives no rewards"),
        (lambda logps: 1 / 0, "fails on a trial of pairs: ZeroDivisionError"),
    ],
)
def test_what_is_no_loss_is_refused_before_the_run(given, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        passed_loss(given, "dpo")


def test_another_loss_is_another_identity():
    assert identity_of(DPO(beta=0.1)) != identity_of(DPO(beta=0.2))
    assert identity_of(DPO(beta=0.1)) == identity_of(DPO(beta=0.1))
    json.dumps(identity_of(passed_loss(own, "dpo")))

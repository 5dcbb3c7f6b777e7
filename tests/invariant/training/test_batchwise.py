"""Losses of the whole step: two passes are the gradient of one graph, and wrongly applied pack by pack they are not."""

import json
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from test_packing import HUGE, PACKINGS, Sorted, objective_of, optimiser_of
from tiny import losses_of, make_examples, make_plan

from preftune.core.errors import Interrupted, NonFiniteLoss
from preftune.core.events import StepDone
from preftune.core.files import read_json
from preftune.core.recipe import LoraConfig, ModelConfig
from preftune.data.pack import pack_of, pack_step
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, Term
from preftune.modeling.adapters import add_lora, trainable_parameters
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model
from preftune.training import loop as loop_module
from preftune.training import resume as resume_module
from preftune.training import watch as watch_module
from preftune.training.loop import run_stage
from preftune.training.step import Objective, counts_of, evaluate, find_culprits, train_step


class PackByPack(Sorted):
    """The feature off: the same loss, said to be no loss of the whole step."""

    is_batchwise = False


def gradient_of(objective, packs):
    """Every weight's gradient in one step, flat."""
    optimiser = optimiser_of(objective)
    seen = []
    optimiser.step = lambda lr: seen.extend(one.grad.clone().flatten() for one in optimiser.masters.values())
    metrics = train_step(objective, packs, optimiser, lr=1e-3, max_grad_norm=None)
    optimiser.zero_grad()
    return metrics["loss"], torch.cat(seen)


def test_pack_by_pack_would_differ(tiny_model):
    objective, examples = objective_of(tiny_model, "sorted margins", "lora")
    wrong = Objective(objective.scorer, PackByPack(), objective.reference)
    whole, gradient = gradient_of(objective, pack_step(examples, HUGE))
    assert gradient_of(wrong, pack_step(examples, HUGE))[0] == pytest.approx(whole, abs=1e-6), "one pack is the whole step"
    for packing in ("one pack each", "permuted"):
        loss, other = gradient_of(wrong, PACKINGS[packing](examples))
        assert abs(loss - whole) > 1e-3
        assert (other - gradient).abs().max() > 1e-3


def test_two_passes_are_the_gradient_of_one_graph_with_dropout(tiny_model):
    """The masks of the second pass are those of the first; other masks would give another gradient."""
    model = add_lora(load_model(ModelConfig(name=str(tiny_model)), precision="float32").model, LoraConfig(rank=4, dropout=0.3), 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    objective = Objective(Scorer(model), Sorted(), None)
    model.train()
    examples = make_examples(6, seed=5)
    packs = pack_step(examples, 64)
    assert len(packs) > 1
    torch.manual_seed(7)
    loss, gradient = gradient_of(objective, packs)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    graph = [objective.scorer.token_logps(pack) for pack in packs]  # every graph at once, which two passes avoid
    assert torch.equal(after, torch.get_rng_state()), "a step draws as many numbers as one pass does"
    from preftune.training.views import Scores, view_of

    view = view_of(objective.loss, packs, Scores(torch.cat(graph)))
    expected = objective.loss(view).terms["sorted"].values.sum() / counts_of(packs)["pair"]
    expected.backward()
    grads = torch.cat([one.grad.flatten() for one in trainable_parameters(model).values()])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert (grads - gradient).abs().max() < 1e-6 * gradient.abs().max()
    torch.manual_seed(8)
    assert (gradient_of(objective, packs)[1] - gradient).abs().max() > 1e-3


def test_held_out_examples_are_one_batch(tiny_model):
    objective, examples = objective_of(tiny_model, "sorted margins", "lora")
    whole = evaluate(objective, pack_step(examples, HUGE))
    parts = evaluate(objective, [pack_of(examples[:1]), pack_of(examples[1:3]), pack_of(examples[3:])])
    wrong = evaluate(Objective(objective.scorer, PackByPack(), objective.reference), pack_step(examples, 1))
    for key, value in whole.items():
        assert parts[key] == pytest.approx(value, abs=1e-5)
    assert abs(wrong["eval_loss"] - whole["eval_loss"]) > 1e-3


@dataclass(frozen=True)
class Running(BaseLoss):
    """A stateful loss: margins against their running mean."""

    mean: float = 0.0
    is_batchwise = True

    def initial_state(self):
        return {"mean": 0.0}

    def advance(self, state, logps):
        return {"mean": 0.5 * state["mean"] + 0.5 * float((logps.chosen_logratio - logps.rejected_logratio).mean()) + 0.1}

    def at(self, state):
        return Running(state["mean"])

    def __call__(self, logps):
        chosen, rejected = logps.chosen_logratio, logps.rejected_logratio
        values = -torch.nn.functional.logsigmoid(chosen - rejected - self.mean)
        return LossTerms({"running": Term(values, "pair")}, chosen.detach(), rejected.detach())


@pytest.fixture
def running(monkeypatch):
    losses.names()
    monkeypatch.setitem(losses._factories, "running", Running)


def stop_at(step):
    def sink(event):
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return sink


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_the_state_of_a_loss_is_resumed(tmp_path, tiny_model, running, monkeypatch, is_forgotten):
    rows = make_examples(16)
    changes = {"method": "running", "loss": {}, "checkpoints": 0, "epochs": 2.0, "evals": 1}
    run_stage(make_plan(tmp_path, tiny_model, rows, folder="whole", **changes))
    with pytest.raises(Interrupted):
        run_stage(make_plan(tmp_path, tiny_model, rows, folder="stopped", **changes), stop_at(3))
    facts = read_json(tmp_path / "stopped" / "checkpoints" / "step-000003" / "manifest.json")
    assert facts["loss_state"]["mean"] > 0.1
    if is_forgotten:  # the feature off
        real = resume_module.load_checkpoint

        def forgetful(path):
            checkpoint = real(path)
            checkpoint.facts.pop("loss_state")
            return checkpoint

        monkeypatch.setattr(resume_module, "load_checkpoint", forgetful)
    run_stage(make_plan(tmp_path, tiny_model, rows, folder="stopped", resume=True, **changes))
    expected, got = losses_of(tmp_path / "whole"), losses_of(tmp_path / "stopped")
    assert (got == expected) is not is_forgotten
    evaluated = [
        [
            json.loads(line)["eval_loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if "eval_" in line
        ]
        for name in ("whole", "stopped")
    ]
    assert (evaluated[0] == evaluated[1]) is not is_forgotten


def test_held_out_examples_are_scored_at_the_state_and_without_dropout(tmp_path, tiny_model, running, monkeypatch):
    real_evaluate, real_step, evaluated, stepped = watch_module.evaluate, loop_module.train_step, [], []

    def evaluate(objective, packs):
        evaluated.append((objective.loss.mean, objective.scorer.model.training))
        return real_evaluate(objective, packs)

    def train_step(objective, packs, optimiser, **options):
        stepped.append(objective.scorer.model.training)
        return real_step(objective, packs, optimiser, **options)

    monkeypatch.setattr(watch_module, "evaluate", evaluate)
    monkeypatch.setattr(loop_module, "train_step", train_step)
    changes = {"method": "running", "loss": {}, "checkpoints": 1, "epochs": 1.0, "evals": 2, "probe": None}
    run_stage(make_plan(tmp_path, tiny_model, make_examples(16), folder="run", **changes))
    kept = read_json(tmp_path / "run" / "checkpoints" / "step-000002" / "manifest.json")["loss_state"]["mean"]
    (first, was_training), (last, _) = evaluated
    assert first == kept != 0.0
    assert last != first
    assert not was_training
    assert stepped == [True] * 4, "and dropout is on again after an evaluation"


def test_a_step_that_fails_leaves_the_state_as_it_was(tiny_model, running):

    objective, examples = objective_of(tiny_model, "dpo", "lora")
    objective = Objective(objective.scorer, Running(), objective.reference)
    state = {}
    optimiser = optimiser_of(objective)
    train_step(objective, pack_step(examples, 64), optimiser, lr=1e-3, max_grad_norm=None, loss_state=state)
    kept = dict(state)
    assert kept["mean"] != 0

    class Broken(Running):
        def at(self, state):
            return Running(float("nan"))

    broken = Objective(objective.scorer, Broken(), objective.reference)
    with pytest.raises(NonFiniteLoss):
        train_step(broken, pack_step(examples, 64), optimiser, lr=1e-3, max_grad_norm=None, loss_state=state)
    assert state == kept


class SortedWithPrompts(Sorted):
    """Batchwise, with the prompts' tokens in it: both kinds of slopes reach the weights."""

    needs = frozenset({"prompt"})

    def __call__(self, logps):
        out = super().__call__(logps)
        values = out.terms["sorted"].values - 0.5 * logps.prompt.logps / logps.prompt.num_tokens
        return LossTerms({"sorted": Term(values, "pair")}, out.chosen_rewards, out.rejected_rewards)


def test_the_slopes_of_prompts_reach_the_weights(tiny_model):
    plain, examples = objective_of(tiny_model, "sorted margins", "lora")
    objective = Objective(plain.scorer, SortedWithPrompts(), plain.reference)
    gradients = [gradient_of(objective, packs_of(examples))[1] for packs_of in PACKINGS.values()]
    assert all((one - gradients[0]).abs().max() < 1e-5 for one in gradients)
    assert (gradients[0] - gradient_of(plain, pack_step(examples, 64))[1]).abs().max() > 1e-3
    held_out = [evaluate(objective, packs_of(examples))["eval_loss"] for packs_of in PACKINGS.values()]
    assert held_out == pytest.approx([held_out[0]] * len(held_out), abs=1e-5)


def test_the_example_that_spoils_a_whole_step_is_named(tiny_model):
    """One value that is none makes every slope of the step none; each example alone tells which it was."""
    objective, examples = objective_of(tiny_model, "sorted margins", "lora")
    guilty = examples[3]

    def poisoned(pack):
        scores = [objective.reference(pack_of([one])) * (torch.nan if one is guilty else 1) for one in pack.examples]
        return torch.cat(scores)

    bad = Objective(objective.scorer, Sorted(), poisoned)
    optimiser = optimiser_of(bad)
    before = {name: one.detach().clone() for name, one in optimiser.masters.items()}
    with pytest.raises(NonFiniteLoss):
        train_step(bad, pack_step(examples, 64), optimiser, lr=1e-3, max_grad_norm=None)
    assert all(torch.equal(before[name], one) for name, one in optimiser.masters.items())
    assert [one.example_id for one, _ in find_culprits(bad, pack_step(examples, 64), optimiser)] == [guilty.example_id]

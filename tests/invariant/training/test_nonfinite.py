"""A NaN stops a stage before its optimiser step: in a row it names the pair, in the weights those; what was saved stays good."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import losses_of, make_examples, make_model, make_plan

from preftune.core.errors import NonFiniteLoss
from preftune.core.events import StepDone
from preftune.core.files import read_json
from preftune.training.checkpoint import latest, load_checkpoint
from preftune.training.invariants import InvariantBroken, not_finite
from preftune.training.loop import run_stage

ROWS = make_examples(20)
PLAN = {"pairs_per_step": 4, "shuffle": False, "epochs": 1.0, "checkpoints": 4, "evals": 0, "probe": None}
ODPO = {**PLAN, "method": "odpo", "loss": {}}


def test_a_row_names_its_pair_and_the_checkpoint_before_it_is_good(tmp_path, tiny_model):
    guilty = replace(ROWS[13], strength=math.nan)  # of step 4
    rows = [*ROWS[:13], guilty, *ROWS[14:]]
    with pytest.raises(NonFiniteLoss, match=r"step 4: the loss is nan .* took no step; at fault: train.jsonl:14 \(") as caught:
        run_stage(make_plan(tmp_path, tiny_model, rows, [], **ODPO))
    assert "\n" not in str(caught.value)
    assert "weights" not in str(caught.value)
    kept = read_json(tmp_path / "run" / "nonfinite.json")
    assert [one["line"] for one in kept["examples"]] == [14]
    assert max(losses_of(tmp_path / "run")) == 3
    whole = run_stage(make_plan(tmp_path, tiny_model, ROWS, [], folder="whole", **ODPO))
    before, same = (load_checkpoint(latest(tmp_path / "run" / "checkpoints")), tmp_path / "whole" / "checkpoints" / "step-000003")
    assert before.facts["step"] == 3
    expected = load_file(same / "parameters.safetensors") if same.is_dir() else None
    if expected is not None:
        assert all(torch.equal(before.parameters[name], tensor) for name, tensor in expected.items())
    assert run_stage(make_plan(tmp_path, tiny_model, ROWS, [], resume=True, **ODPO)).steps == whole.steps
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_weights_that_turn_bad_are_named_and_no_row_is_blamed(tmp_path, tiny_model, adapter):
    plan = make_plan(tmp_path, tiny_model, ROWS, [], adapter=adapter, **PLAN)

    def spoil(event):
        if isinstance(event, StepDone) and event.step == 3:
            parameters = {name: one for name, one in plan.loaded.model.named_parameters() if one.requires_grad}
            name = next(reversed(parameters))
            parameters[name].data.view(-1)[0] = math.nan

    with pytest.raises(
        NonFiniteLoss, match=r"step 4: .*the weights are at fault, not the rows: 1 tensors are not finite, first "
    ) as caught:
        run_stage(plan, spoil)
    assert "at fault: train.jsonl" not in str(caught.value)
    assert "the step held 4 examples, first train.jsonl:13" in str(caught.value)
    kept = read_json(tmp_path / "run" / "nonfinite.json")
    assert len(kept["weights"]) == 1
    assert [one["line"] for one in kept["examples"]] == [13, 14, 15, 16]
    assert max(losses_of(tmp_path / "run")) == 3


def test_a_model_whose_files_hold_a_nan_is_refused_before_anything_is_scored(tmp_path, tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("bad") / "model")
    tensors = load_file(model / "model.safetensors")
    name = sorted(tensors)[5]
    tensors[name].view(-1)[2] = math.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvariantBroken, match=rf"1 of its weights hold NaN or infinity, first {name}; .*restore it"):
        run_stage(make_plan(tmp_path, model, ROWS, [], **PLAN))
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_buffer_that_holds_a_nan_is_seen_and_a_mask_of_infinities_is_none():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert not_finite(model) == []
    model.register_buffer("correction", torch.tensor([0.0, math.nan]))  # as models of experts have one that routes
    assert not_finite(model) == ["correction"]

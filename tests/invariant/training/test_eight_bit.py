"""Moments of 8 bits: a quarter of their memory, nearly the same path, resumed to the same bits."""

import importlib.util
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import losses_of, make_model, make_plan

from preftune.core.errors import Interrupted, UsageError
from preftune.core.recipe import LoraConfig
from preftune.training import eight_bit
from preftune.training.loop import run_stage
from preftune.training.optim import Optimiser

SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra quant is not installed")


def moved(kind, steps):
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(128, 64)), torch.nn.Parameter(torch.randn(64))
    target = torch.randn(128, 64)
    optimiser = Optimiser({"matrix": matrix, "vector": vector}, kind=kind, **SETTINGS)
    for _ in range(steps):
        torch.autograd.backward(((matrix * vector - target) ** 2).sum())
        optimiser.step(1e-2)
    return optimiser, torch.cat([matrix.detach().view(-1), vector.detach()])


def test_it_takes_nearly_the_same_path_in_a_quarter_of_the_memory():
    _, start = moved("adamw", 0)
    whole, end = moved("adamw", 30)
    narrow, close = moved("adamw_8bit", 30)
    assert 0 < (close - end).norm() < 0.2 * (end - start).norm()

    def size(optimiser, name):
        return sum(one.nbytes for key, one in optimiser.tensors().items() if key.startswith(name))

    assert size(narrow, "matrix") < 0.27 * size(whole, "matrix")
    assert size(narrow, "vector") == pytest.approx(size(whole, "vector"), abs=8), "small tensors keep 32 bits"


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_stage_trains_and_resumes_to_the_same_bits(tmp_path, adapter):
    model = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    changes = {"adapter": adapter, "lora": LoraConfig(rank=32, alpha=8), "optimizer": "adamw_8bit", "warmup": 0.0}
    run_stage(make_plan(tmp_path, model, folder="whole", **changes))

    stopping = make_plan(tmp_path, model, folder="halves", **changes)

    def stop(event):
        if getattr(event, "step", None) == 4 and type(event).__name__ == "StepDone":
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_stage(stopping, stop)
    run_stage(make_plan(tmp_path, model, folder="halves", resume=True, **changes))
    losses = losses_of(tmp_path / "whole")
    assert losses == losses_of(tmp_path / "halves")
    assert losses[min(losses)] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[max(losses)] != losses[min(losses)]
    file = "adapter_model.safetensors" if adapter == "lora" else "model.safetensors"
    one, other = (load_file(tmp_path / name / "final" / file) for name in ("whole", "halves"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert losses != losses_of_plain(tmp_path, model, changes), "the feature is on"


def losses_of_plain(tmp_path, model, changes):
    run_stage(make_plan(tmp_path, model, folder="plain", **{**changes, "optimizer": "adamw"}))
    return losses_of(tmp_path / "plain")


def test_where_the_package_is_absent_the_extra_is_named(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(eight_bit, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"adamw_8bit needs the package bitsandbytes; pip install 'preftune\[quant\]'"):
        run_stage(make_plan(tmp_path, tiny_model, optimizer="adamw_8bit"))

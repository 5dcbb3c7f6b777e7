"""Schedules equal transformers' get_scheduler; AdamW equals torch's; bfloat16 parameters have float32 masters."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from preftune.core.errors import CheckpointError
from preftune.core.recipe import StageConfig
from preftune.training.optim import DEFAULT_LR, METHOD_LR, LrSchedule, Optimiser, lr_of, num_steps_of

SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("num_steps", "warmup"), [(10, 0.0), (10, 0.1), (37, 0.25), (3, 0.5), (1, 0.0), (200, 0.03)])
def test_schedules_equal_transformers(schedule, num_steps, warmup):
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    mine = LrSchedule(schedule, 3e-4, num_steps, warmup)
    theirs = get_scheduler(name, optimiser, num_warmup_steps=mine.num_warmup_steps, num_training_steps=num_steps)
    for step in range(num_steps):
        assert mine.at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimiser.step()
        theirs.step()


@pytest.mark.parametrize(("floor", "cycles"), [(0.1, 0.5), (0.0, 1.5), (0.25, 1.0), (1.0, 0.5)])
def test_a_cosine_with_a_floor_and_cycles_equals_transformers(floor, cycles):
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    mine = LrSchedule("cosine", 3e-4, 37, 0.1, min_ratio=floor, num_cycles=cycles)
    options = {"num_cycles": cycles, "min_lr_rate": floor}
    theirs = get_scheduler("cosine_with_min_lr", optimiser, mine.num_warmup_steps, 37, scheduler_specific_kwargs=options)
    for step in range(37):
        assert mine.at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimiser.step()
        theirs.step()


def test_a_line_ends_at_its_floor():
    rates = [LrSchedule("linear", 2.0, 5, 0.0, min_ratio=0.25).at(step) for step in range(6)]
    assert rates == pytest.approx([2.0, 1.7, 1.4, 1.1, 0.8, 0.5])


def test_schedules_differ_from_each_other():
    values = {name: LrSchedule(name, 1.0, 10, 0.1).at(7) for name in ("linear", "cosine", "constant")}
    assert len(set(values.values())) == 3


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": nn.Parameter(torch.randn(5, 3, generator=generator).to(dtype)),
        "bias": nn.Parameter(torch.randn(5, generator=generator).to(dtype)),
    }


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return {"weight": torch.randn(5, 3, generator=generator), "bias": torch.randn(5, generator=generator)}


def test_steps_equal_torchs_plain_adamw():
    ours, theirs = parameters(), parameters()
    mine = Optimiser(ours, **SETTINGS)
    groups = [{"params": [theirs["weight"]]}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, fused=False, foreach=False, **SETTINGS)
    for step in range(5):
        for name, gradient in gradients(step).items():
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        norm = mine.clip(1.0)
        assert norm == nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        mine.step(1e-2)
        plain.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
        assert ours[name].grad is None


def test_vectors_do_not_decay():
    ours = parameters()
    before = {name: one.detach().clone() for name, one in ours.items()}
    optimiser = Optimiser(ours, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5)
    for one in ours.values():
        one.grad = torch.zeros_like(one)
    optimiser.step(0.1)
    torch.testing.assert_close(ours["weight"], before["weight"] * 0.95)
    assert torch.equal(ours["bias"], before["bias"])


def test_masters_keep_what_bfloat16_would_lose():
    narrow = {"weight": nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))}
    optimiser = Optimiser(narrow, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    bare = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([bare], lr=1e-4, weight_decay=0.0)
    for _ in range(60):  # 60 steps of 1e-4 add up to 6e-3, above bfloat16's spacing of 3.9e-3 below one; one step is not
        (narrow["weight"].float().sum()).backward()
        optimiser.step(1e-4)
        bare.grad = torch.ones_like(bare)
        plain.step()
    assert torch.equal(bare, torch.ones(4, 4, dtype=torch.bfloat16)), "without masters nothing moves"
    torch.testing.assert_close(optimiser.masters["weight"], torch.full((4, 4), 1 - 6e-3), rtol=1e-4, atol=0)
    assert narrow["weight"].dtype == torch.bfloat16
    assert torch.equal(narrow["weight"], optimiser.masters["weight"].bfloat16())
    assert (narrow["weight"] < 1).all()


def test_narrow_gradients_add_up_in_float32():
    narrow = {"weight": nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))}
    optimiser = Optimiser(narrow, **SETTINGS)
    for size in (256.0, *[1.0] * 4):  # in bfloat16 256 + 1 = 256
        (narrow["weight"] * size).sum().backward()
    assert narrow["weight"].grad is None
    assert optimiser.clip(None).item() == 260.0
    optimiser.zero_grad()
    assert optimiser.masters["weight"].grad is None


def test_state_goes_round():
    first, second = parameters(torch.bfloat16), parameters(torch.bfloat16)
    one, two = Optimiser(first, **SETTINGS), Optimiser(second, **SETTINGS)

    def take(optimiser, step):
        for name, gradient in gradients(step).items():
            optimiser.masters[name].grad = gradient.clone()
        optimiser.step(1e-2)

    for step in range(3):
        take(one, step)
    kept = {name: value.detach().clone() for name, value in one.masters.items()}
    moments = {name: value.clone() for name, value in one.tensors().items()}
    assert set(moments) == {f"{name}/{kind}" for name in first for kind in ("exp_avg", "exp_avg_sq", "step")}
    two.load(kept, moments)
    assert all(torch.equal(first[name], second[name]) for name in first), "what the next pass computes with, before any step"
    for optimiser in (one, two):
        take(optimiser, 3)
    for name in first:
        assert torch.equal(one.masters[name], two.masters[name])
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("wrong", [{"weight": torch.zeros(5, 3)}, {"weight": torch.zeros(2, 3), "bias": torch.zeros(5)}])
def test_other_parameters_are_refused(wrong):
    with pytest.raises(CheckpointError, match="not this model's"):
        Optimiser(parameters(), **SETTINGS).load(wrong, {})


def test_default_rates():
    assert lr_of(StageConfig(method="dpo", adapter="full"), "pairs") == 5e-7
    assert lr_of(StageConfig(method="sft", adapter="lora"), "demonstrations") == 2e-4
    assert lr_of(StageConfig(lr=3e-3), "pairs") == 3e-3
    assert lr_of(StageConfig(method="simpo", adapter="full"), "pairs") == METHOD_LR["simpo", "full"] == 6e-7
    assert lr_of(StageConfig(method="simpo"), "pairs") == lr_of(StageConfig(method="dpo"), "pairs")
    assert lr_of(StageConfig(method="kto", adapter="full"), "unpaired") == 1e-6
    assert set(DEFAULT_LR) == {
        (view, adapter) for view in ("pairs", "unpaired", "demonstrations") for adapter in ("lora", "full")
    }


@pytest.mark.parametrize(
    ("num_examples", "changes", "steps"),
    [
        (0, {}, 0),
        (1, {}, 1),
        (16, {}, 1),
        (17, {}, 2),
        (17, {"epochs": 1.5}, 3),
        (160, {"epochs": 0.1}, 1),
        (160, {"epochs": 3, "max_steps": 7}, 7),
        (16, {"max_steps": 7}, 1),
    ],
)
def test_number_of_steps(num_examples, changes, steps):
    assert num_steps_of(StageConfig(**changes), num_examples) == steps

"""Every loss over pairs trains through the real loop: finite, moving, and the same steps for two packings."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import losses_of, make_examples, make_plan

from preftune.core.recipe import LoraConfig
from preftune.maths.losses.base import losses
from preftune.training.loop import run_stage

pytestmark = pytest.mark.slow  # two runs of three steps for each of some thirty losses

OPTIONS = {
    "mix": {"parts": {"hinge": {}, "ld_dpo": {"weight": 0.5}, "sft": {"weight": 0.1}}},
    "sppo_soft": {"beta": 0.01, "slope": 1.0},
    "sppo_hard": {"beta": 0.01},
}
STAGES = {name: (name, OPTIONS.get(name, {})) for name in losses.names() if losses.factory(name).view == "pairs"}
STAGES |= {
    f"{name}, {divergence}": (name, {"divergence": divergence})
    for name, divergence in (("dpo", "forward_kl"), ("dpo", "alpha"), ("ipo", "jensen_shannon"), ("hinge", "jensen_shannon"))
}
STAGES["dpo, by length"] = ("dpo", {"beta": 5.0, "length_normalised": True, "rpo_alpha": 0.5})
STAGES["odpo, log"] = ("odpo", {"scaling": "log"})


def rows_for(method, options):
    """Pairs with confidences and strengths on some, and ties where the loss learns from them."""
    takes_ties = "ties" in losses.build(method, options).needs
    return [
        replace(
            one,
            confidence=(None, 0.9, 0.6)[at % 3],
            strength=(0.0, 1.0, 2.0, 0.5)[at % 4],
            is_tie=takes_ties and at % 4 == 3,
        )
        for at, one in enumerate(make_examples(12))
    ]


def run(tmp_path, model, method, options, tokens):
    plan = make_plan(
        tmp_path, model, rows_for(method, options), rows_for(method, options)[:3], folder=f"packs-of-{tokens}", method=method,
        loss=options, lora=LoraConfig(rank=4), tokens_per_pack=tokens, max_steps=3, checkpoints=0, evals=1, probe=False,
        warmup=0.0, schedule="constant", lr=1e-3,
    )  # fmt: skip
    run_stage(plan)
    adapters = {name: value.clone() for name, value in plan.loaded.model.state_dict().items() if "lora_B" in name}
    assert adapters
    return losses_of(plan.folder), torch.cat([value.flatten() for value in adapters.values()])


@pytest.mark.parametrize("stage", STAGES)
def test_three_steps_are_finite_and_do_not_depend_on_the_packing(tmp_path, tiny_model, stage):
    method, options = STAGES[stage]
    one, moved = run(tmp_path, tiny_model, method, options, 40)
    other, moved_too = run(tmp_path, tiny_model, method, options, 4000)
    assert sorted(one) == [1, 2, 3]
    assert all(math.isfinite(value) for value in one.values())
    assert moved.abs().max() > 1e-4, "the adapters were trained: they begin at 0"
    for step, value in one.items():
        assert other[step] == pytest.approx(value, rel=2e-4, abs=1e-5), step
    # AdamW divides a gradient by its own size, so rounding of the smallest gradients is what moves; 3 steps of 1e-3 in all
    assert (moved - moved_too).abs().mean() < 3e-3 * 0.01

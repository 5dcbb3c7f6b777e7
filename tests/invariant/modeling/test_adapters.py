"""Adapters: the lean forward is PEFT's, a fresh adapter is the frozen base bit for bit, saving loses nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from tiny_models import BASIC, GPT2_LIKE, build, gradients, largest, plain_logps, relative, small_pack
from torch import Tensor, nn

from preftune.core.errors import UsageError
from preftune.core.recipe import LoraConfig
from preftune.modeling.adapters import LeanLoraLinear, adapter_off, add_lora, trainable_parameters
from preftune.modeling.attention import plain_attention
from preftune.modeling.forward import Scorer, checkpoint_activations
from preftune.modeling.kernels import EAGER


def lora_model(
    dtype: torch.dtype = torch.float32, kind: str = "llama", settings: dict[str, Any] = BASIC, **options: Any
) -> PeftModel:
    model = build(kind, settings)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return add_lora(model, LoraConfig(rank=4, alpha=8.0, **options), seed=0)


def randomise(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def use_pefts_forward(model: PeftModel) -> None:
    for module in model.modules():
        if isinstance(module, LeanLoraLinear):
            module.__class__ = PeftLoraLinear


@pytest.mark.parametrize(
    ("kind", "settings", "options"),
    [
        ("llama", BASIC, {}),
        ("llama", BASIC, {"rslora": True}),
        ("llama", BASIC, {"dora": True}),
        ("gpt2", GPT2_LIKE, {"target_modules": ("c_attn", "c_proj")}),
        ("phi", BASIC, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_lean_forward_equals_pefts(kind: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    model = lora_model(kind=kind, settings=settings, **options)
    pack = small_pack()
    scorer = Scorer(model)
    fresh = scorer.token_logps(pack)
    randomise(model)
    lean = scorer.token_logps(pack)
    assert largest(lean, fresh) > 1e-2
    ours = gradients(model, lean)
    assert any(isinstance(module, LeanLoraLinear) for module in model.modules())
    use_pefts_forward(model)
    theirs = scorer.token_logps(pack)
    assert largest(lean, theirs) < 1e-5
    assert relative(ours, gradients(model, theirs)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"rslora": True}])
def test_margin_at_step_0_is_exactly_zero(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = lora_model(dtype, **options)
    pack = small_pack()
    scorer = Scorer(model)
    with torch.no_grad(), adapter_off(model):
        reference = scorer.token_logps(pack)
    model.train()
    policy = scorer.token_logps(pack)
    assert policy.requires_grad
    assert torch.equal(policy, reference)
    randomise(model)
    assert not torch.equal(scorer.token_logps(pack), reference)
    with torch.no_grad(), adapter_off(model):  # whatever was trained, the reference is the frozen base
        assert torch.equal(scorer.token_logps(pack), reference)


def test_adapter_off_is_the_frozen_copy() -> None:
    base = build("llama", BASIC)
    frozen = Scorer(copy.deepcopy(base))
    model = add_lora(base, LoraConfig(rank=4), seed=0)
    randomise(model)
    scorer = Scorer(model)
    pack = small_pack()
    with adapter_off(model):
        assert torch.equal(scorer.token_logps(pack), frozen.token_logps(pack))
    assert not torch.equal(scorer.token_logps(pack), frozen.token_logps(pack))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_checkpointing_changes_nothing(dtype: torch.dtype, has_lora: bool, blocks: bool) -> None:
    model: nn.Module = lora_model(dtype) if has_lora else build("llama", BASIC)
    if has_lora:
        randomise(model)
    pack = small_pack()
    calls = count_calls(model)
    scorer = Scorer(model, blocks=blocks, kernels=replace(EAGER, swiglu=lambda both: calls.append("block") or EAGER.swiglu(both)))
    assert (scorer.num_blocks > 0) == blocks
    model.train()
    plain = scorer.token_logps(pack)
    wanted = gradients(model, plain)
    checkpoint_activations(model)
    saved = scorer.token_logps(pack)
    assert torch.equal(plain, saved)
    before = len(calls)
    got = gradients(model, saved)
    assert len(calls) > before  # layers really run again in backward
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def count_calls(model: nn.Module) -> list[str]:
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_dropout_follows_the_random_state_and_rests_in_evaluation() -> None:
    model = lora_model(dropout=0.5)
    randomise(model)
    pack = small_pack()
    scorer = Scorer(model)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return scorer.token_logps(pack)

    model.eval()
    assert torch.equal(run(1), run(2))
    model.train()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_building_a_scorer_moves_neither_modes_nor_random_state() -> None:
    model = lora_model(dropout=0.5)
    model.train()
    before = torch.get_rng_state()
    Scorer(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_adapters_are_float32_of_the_seed_and_leave_the_random_state() -> None:
    before = torch.get_rng_state()
    first, again, other = (
        trainable_parameters(add_lora(build("llama", BASIC).bfloat16(), LoraConfig(rank=4), seed)) for seed in (3, 3, 4)
    )
    torch.manual_seed(0)
    assert {one.dtype for one in first.values()} == {torch.float32}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert not any("lm_head" in name for name in first)
    torch.set_rng_state(before)
    add_lora(build_without_seed(before), LoraConfig(rank=4), 5)
    assert torch.equal(torch.get_rng_state(), before)


def build_without_seed(state: Tensor) -> nn.Module:
    model = build("llama", BASIC)
    torch.set_rng_state(state)
    return model


def test_a_wrong_layer_name_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"lora\.target_modules"):
        add_lora(build("llama", BASIC), LoraConfig(target_modules=("q_projj",)), 0)


def test_adapters_on_the_head_count() -> None:
    model = lora_model(target_modules=("lm_head", "q_proj"))
    randomise(model)
    pack = small_pack()
    scorer = Scorer(model)
    got = scorer.token_logps(pack)
    merged = copy.deepcopy(model).merge_and_unload()
    with plain_attention(merged):
        expected = plain_logps(merged, pack)
    with adapter_off(model):
        assert largest(scorer.token_logps(pack), expected) > 1e-2
    assert largest(got, expected) < 1e-4
    names = gradients(model, scorer.token_logps(pack))
    assert any("lm_head.lora_B" in name for name in names)


def test_bfloat16_errs_no_more_than_a_plain_bfloat16_forward() -> None:
    """Against float32: mean and maximum error at most 1.1 times those of plain rows (performance.md section 7)."""
    ours, theirs = [], []
    for seed in range(6):
        pack = small_pack(seed)
        exact = build("llama", {**BASIC, "hidden_size": 64}, seed=seed)
        low = copy.deepcopy(exact)
        for parameter in low.parameters():
            parameter.data = parameter.data.bfloat16()
        for parameter, rounded in zip(exact.parameters(), low.parameters(), strict=True):
            parameter.data = rounded.data.float()
        with torch.no_grad():
            wanted = plain_logps(exact, pack)
            theirs.append((plain_logps(low, pack) - wanted).abs())
            ours.append((Scorer(low, shared=True).token_logps(pack) - wanted).abs())
    mine, plain = torch.cat(ours), torch.cat(theirs)
    assert float(mine.mean()) <= 1.1 * float(plain.mean())
    assert float(mine.max()) <= 1.1 * float(plain.max()) + 0.01


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own use of transformers
def test_saved_files_are_pefts(tmp_path: Path) -> None:
    model = lora_model()
    randomise(model)
    pack = small_pack()
    expected = Scorer(model).token_logps(pack)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(build("llama", BASIC), str(tmp_path))
    assert (
        torch.equal(Scorer(again).token_logps(pack).detach(), expected.detach())
        or largest(Scorer(again).token_logps(pack), expected) < 1e-5
    )

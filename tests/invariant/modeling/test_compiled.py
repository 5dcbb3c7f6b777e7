"""Compiled blocks give the log-probs and gradients of plain rows, and a policy its reference's bits."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from tiny_models import BASIC, build, gradients, largest, relative, small_pack
from torch import nn

from preftune.core.recipe import LoraConfig
from preftune.modeling.adapters import adapter_off, add_lora
from preftune.modeling.compile import choose_kernels, why_not_compiled
from preftune.modeling.forward import Scorer
from preftune.modeling.native_code import can_run_natively

CPU = torch.device("cpu")


def shake_adapters(model: nn.Module) -> None:
    """Give adapters values that count; nothing where there are none."""
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=made) * 0.05)


@pytest.mark.skipif(bool(why_not_compiled(CPU)), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("has_lora", [False, True])
def test_compiled_blocks_equal_plain_rows(has_lora: bool) -> None:
    model: nn.Module = build("llama", BASIC)
    pack, told = small_pack(), list[str]()
    if has_lora:
        model = add_lora(model, LoraConfig(rank=4), seed=0)
    scorer = Scorer(model, kernels=choose_kernels("on", CPU, torch.float32, 1, told.append))
    with torch.no_grad(), adapter_off(model):
        reference = scorer.token_logps(pack)
    assert torch.equal(scorer.token_logps(pack), reference)  # fresh adapters change no bit
    shake_adapters(model)
    wanted, got = scorer.plain().token_logps(pack), scorer.token_logps(pack)
    assert largest(got, wanted) < 1e-4
    assert relative(gradients(model, got), gradients(model, wanted)) < 1e-4
    assert scorer.num_blocks == 2
    assert told == []


WIDE = BASIC | {"hidden_size": 128, "intermediate_size": 160, "max_position_embeddings": 64}  # heads of 32, whole vectors


@pytest.mark.skipif(not can_run_natively(), reason="this processor has no AVX512-BF16, or it has AMX")
@pytest.mark.skipif(bool(why_not_compiled(CPU)), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("has_lora", [False, True])
def test_our_own_kernels_err_no_more_than_plain_rows_in_bfloat16(has_lora: bool) -> None:
    base = build("llama", WIDE)
    with torch.no_grad():  # as initialised, not amplified: rounding to 8 bits leaves amplified models nothing to compare
        for parameter in base.parameters():
            parameter.div_(7.0 if parameter.ndim > 1 else 1.0)
            parameter.copy_(parameter.bfloat16().float())
    pack = small_pack()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, dtype in (("wanted", torch.float32), ("plain", torch.bfloat16), ("native", torch.bfloat16)):
        model: nn.Module = copy.deepcopy(base).to(dtype)
        if has_lora:
            model = add_lora(model, LoraConfig(rank=4), seed=0)
        kernels = choose_kernels("on" if name == "native" else "off", CPU, dtype, 1, pytest.fail)
        scorer = Scorer(model, kernels=kernels)
        if name == "native":
            assert (kernels.name, scorer.num_blocks) == ("native", 2)
        with torch.no_grad(), adapter_off(model) if has_lora else contextlib.nullcontext():
            reference = scorer.token_logps(pack)
        assert torch.equal(scorer.token_logps(pack), reference)  # fresh adapters change no bit
        shake_adapters(model)
        logps = scorer.token_logps(pack) if name == "native" else scorer.plain().token_logps(pack)
        slopes = {key: slope.float() for key, slope in gradients(model, logps).items()}
        found[name] = {"logps": logps.detach()} | slopes
    native, plain = (norms(found[name], found["wanted"]) for name in ("native", "plain"))
    assert native["logps"] < 1.15 * plain["logps"]
    assert sum(native.values()) < 1.15 * sum(plain.values())


def norms(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """The norm of what each differs by, relative to its own."""
    assert found.keys() == wanted.keys()
    return {name: float((found[name] - one).norm() / one.norm().clamp_min(1e-9)) for name, one in wanted.items()}

"""Compiled blocks give the log-probs and gradients of plain rows, and a policy its reference's bits."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BASIC, build, gradients, largest, relative, small_pack
from torch import nn

from preftune.core.recipe import LoraConfig
from preftune.modeling.adapters import adapter_off, add_lora
from preftune.modeling.compile import choose_kernels, why_not_compiled
from preftune.modeling.forward import Scorer

CPU = torch.device("cpu")


@pytest.mark.skipif(bool(why_not_compiled(CPU)), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("has_lora", [False, True])
def test_compiled_blocks_equal_plain_rows(has_lora: bool) -> None:
    model: nn.Module = build("llama", BASIC)
    pack, told = small_pack(), list[str]()
    if has_lora:
        model = add_lora(model, LoraConfig(rank=4), seed=0)
    scorer = Scorer(model, kernels=choose_kernels("on", CPU, 1, told.append))
    with torch.no_grad(), adapter_off(model):
        reference = scorer.token_logps(pack)
    assert torch.equal(scorer.token_logps(pack), reference)  # fresh adapters change no bit
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=made) * 0.05)
    wanted, got = scorer.plain().token_logps(pack), scorer.token_logps(pack)
    assert largest(got, wanted) < 1e-4
    assert relative(gradients(model, got), gradients(model, wanted)) < 1e-4
    assert scorer.num_blocks == 2
    assert told == []

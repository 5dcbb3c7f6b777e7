"""Low-rank adapters: PEFT's formats and modules, with a forward that never casts activations up.

Adapters are float32 (their updates are far below what bfloat16 resolves) on weights of any dtype. PEFT's own forward
casts the activations to float32 for every adapter; here the two small matrices are cast down instead, once a forward:

    y = x W^T + b;    y + (drop(x) A^T) (s B)^T        s = alpha / r, or alpha / sqrt(r)

Anything that is not a plain adapter (DoRA, several at once, a quantised base) takes PEFT's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from preftune.core.errors import UsageError
from preftune.core.recipe import LoraConfig
from preftune.modeling.quiet import quiet


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> PeftModel:
    """Put fresh adapters on a model: A is drawn from ``seed``, B is zero, so the function is unchanged.

    ``all-linear`` means every linear layer except the output head. The caller's random state is left as it was.
    UsageError where no layer has one of the names.
    """
    names = config.target_modules
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha),
        lora_dropout=config.dropout,
        target_modules=names if isinstance(names, str) else list(names),
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        try:
            wrapped = cast(PeftModel, peft.get_peft_model(cast(Any, model), settings))
        except ValueError as error:
            raise UsageError(f"lora.target_modules: {str(error).splitlines()[0]}") from None
    make_lean(wrapped)
    return wrapped


def make_lean(model: PeftModel) -> None:
    """Give every plain adapter layer the lean forward; its parameters, names and file format stay PEFT's."""
    for module in model.modules():
        if type(module) is PeftLoraLinear and isinstance(module.base_layer, nn.Linear | Conv1D):
            module.__class__ = LeanLoraLinear


class LeanLoraLinear(PeftLoraLinear):
    """PEFT's LoRA layer with the forward described in this module."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out) in the dtype of x."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        is_plain = not (self.disable_adapters or self.merged or args or kwargs) and len(active) == 1
        if not is_plain or active[0] in self.lora_variant or self.lora_bias[active[0]]:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        y = cast(Tensor, self.base_layer(x))
        low = x.dtype
        a = cast(Tensor, self.lora_A[name].weight).to(low)
        b = (cast(Tensor, self.lora_B[name].weight) * self.scaling[name]).to(low)
        inner = nn.functional.linear(self.lora_dropout[name](x), a)
        added = torch.addmm(y.view(-1, y.shape[-1]), inner.view(-1, inner.shape[-1]), b.t())
        return added.view(y.shape)


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedMatrix:
    """A matrix of the base with the adapter on it. weight: of the base, (out, in) or as its layer holds it."""

    weight: nn.Parameter
    layer: PeftLoraLinear

    def added(self) -> Tensor:
        """What the adapter adds to ``weight`` now, s B A in its shape, float32."""
        return self.layer.get_delta_weight(self.layer.active_adapters[0]).float()


def adapted_matrices(model: nn.Module) -> dict[str, AdaptedMatrix] | None:
    """Every adapted matrix by the name of its layer; None where adapters are not plain ones on matrices of numbers."""
    found: dict[str, AdaptedMatrix] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, PeftLoraLinear) or len(module.active_adapters) != 1:
            return None
        weight = cast(nn.Linear, module.get_base_layer()).weight
        if module.active_adapters[0] in module.lora_variant or not weight.is_floating_point():
            return None
        found[name] = AdaptedMatrix(cast(nn.Parameter, weight), module)
    return found or None


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimiser moves, by name, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model without its fresh adapters: the reference. For a model without adapters nothing changes."""
    if not isinstance(model, PeftModel):
        yield
        return
    with model.disable_adapter():
        yield

"""The keys of a recipe that trade memory for time, and that of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Ge
from pydantic import BeforeValidator

from preftune.core.errors import RecipeError
from preftune.core.section import Section

if TYPE_CHECKING:
    from preftune.core.recipe import ModelConfig, StageConfig

Checkpointing: TypeAlias = Literal["auto", "on", "off"]
Offloading: TypeAlias = Literal["off", "host", "disk"]
OptimizerName: TypeAlias = Literal["adamw", "adamw_8bit"]


def _switch(value: Any) -> Any:
    """YAML reads on, off, yes, no and true as truth values."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value


class MemoryOptions(Section):
    """What a stage keeps in memory while it trains, and how its weights are moved.

    gradient_checkpointing: ``on`` keeps only the inputs of layers and computes the rest again in backward; ``auto`` does so
    where the largest pack would not fit otherwise. activation_offloading: where those inputs go until backward wants
    them: ``host``, the pinned memory of the machine (GPU only), or ``disk``, a file in the run's folder; implies
    checkpointing. optimizer: ``adamw_8bit`` keeps its moments in a quarter of the memory (bitsandbytes).
    router_aux_loss_coef: weight of the loss that balances the experts of a mixture, on the policy only; ``None``:
    what the model's configuration says where it outputs router logits, else 0.
    """

    gradient_checkpointing: Annotated[Checkpointing, BeforeValidator(_switch)] = "auto"
    activation_offloading: Annotated[Offloading, BeforeValidator(_switch)] = "off"
    optimizer: OptimizerName = "adamw"
    router_aux_loss_coef: Annotated[float, Ge(0)] | None = None


def check_quantised(model: ModelConfig, stages: Sequence[StageConfig]) -> None:
    """RecipeError, naming the field, where a rounded base contradicts another key."""
    if model.load_in_4bit and model.load_in_8bit:
        raise RecipeError("model.load_in_8bit: contradicts load_in_4bit; write one of them")
    if model.load_in_4bit or model.load_in_8bit:
        key = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        for stage in stages:
            if stage.kind == "train" and stage.adapter == "full":
                raise RecipeError(f"adapter: full trains all weights, and model.{key} rounds them; write adapter: lora")

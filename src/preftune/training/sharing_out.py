"""Whether the processes of a run copy the model or share it out, and which settings cannot be spread at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from preftune.core.errors import Finding
from preftune.core.launch import Launch
from preftune.core.recipe import StageConfig

SpreadKind: TypeAlias = Literal["one", "ddp", "fsdp2"]
COPY_SHARE = 0.5
"""Of a device's memory that a copy of the model may take before ``auto`` shares it out."""

_GB = 1e9
_MOMENTS = 12  # bytes beside the weights for each trained one: gradient and two moments, float32


@dataclass(frozen=True, slots=True)
class Sizes:
    """Weights of a model and of what a stage trains, the bytes of one, and the memory of one device (None: unknown)."""

    num_weights: int
    num_trained: int
    bytes_each: int
    device_bytes: int | None = None


def spread_kind(config: StageConfig, launch: Launch, sizes: Sizes | None) -> SpreadKind:
    """How a stage is spread over the processes.

    ``auto``: full fine-tuning is shared out, adapters on a copied model train by averaged gradients, unless a copy takes
    more than half of a device.
    """
    if launch.size == 1:
        return "one"
    if config.distributed != "auto":
        return config.distributed
    if config.adapter == "full":
        return "fsdp2"
    if sizes is None or sizes.device_bytes is None:
        return "ddp"
    return "fsdp2" if sizes.num_weights * sizes.bytes_each > COPY_SHARE * sizes.device_bytes else "ddp"


def check_distributed(
    config: StageConfig, launch: Launch, kind: SpreadKind, *, precision: str, quantised_by: str | None
) -> list[Finding]:
    """Blockers and warnings of a stage that several processes are to train."""
    if launch.size == 1:
        return []
    found: list[Finding] = []
    name = f"stage {config.name}"
    if config.kind != "train":
        fact = f"{name}: method {config.method} makes data in one process, and torchrun started {launch.size}"
        way_out = "run `preftune generate` first, or run the recipe without torchrun"
        return [Finding("blocker", "distributed_method", fact, way_out)]
    if kind == "ddp" and config.adapter == "full" and precision == "bfloat16":
        fact = f"{name}: distributed: ddp averages bfloat16 gradients, and adapter: full adds them up in float32"
        found.append(Finding("blocker", "distributed_precision", fact, "write distributed: fsdp2, or model.dtype: float32"))
    if kind == "fsdp2" and quantised_by is not None:
        fact = f"{name}: distributed: fsdp2 cannot share out weights quantised by {quantised_by}"
        found.append(Finding("blocker", "distributed_quantised", fact, "write distributed: ddp, or name the unquantised model"))
    if kind == "fsdp2" and config.optimizer != "adamw":
        fact = f"{name}: optimizer: {config.optimizer} keeps moments of whole tensors, and distributed: fsdp2 parts them"
        found.append(Finding("blocker", "distributed_optimizer", fact, "write optimizer: adamw, or distributed: ddp"))
    if config.pairs_per_step < launch.size:
        fact = f"{name}: pairs_per_step is {config.pairs_per_step} and {launch.size} processes train, so some have nothing to do"
        found.append(Finding("warning", "idle_ranks", fact, f"write pairs_per_step: {launch.size} or more, or start fewer"))
    if config.lora.dropout > 0 and config.adapter == "lora":
        fact = f"{name}: lora.dropout draws on every process, so the number of processes changes the result"
        found.append(Finding("warning", "distributed_dropout", fact, "write lora.dropout: 0 where that matters"))
    return found


def describe(config: StageConfig, launch: Launch, kind: SpreadKind, sizes: Sizes | None) -> str:
    """How a stage's memory falls on the processes, in a line."""
    words = f"{launch.size} processes on {math.ceil(launch.size / launch.local_size)} host(s), {kind}"
    if sizes is None:
        return words
    weights = sizes.num_weights * sizes.bytes_each
    if kind == "fsdp2" and config.adapter == "full":
        weights = sizes.num_weights * 4  # the float32 masters are what is shared out
    state = sizes.num_trained * _MOMENTS
    if kind == "fsdp2":
        words += f": each holds 1/{launch.size} of weights ({_gb(weights)}), gradients and moments ({_gb(state)}): "
        return words + f"{_gb((weights + state) / launch.size)}, and one layer whole at a time"
    return words + f": each holds all weights ({_gb(weights)}), gradients and moments ({_gb(state)}), and its part of every step"


def facts_of(launch: Launch, kind: SpreadKind) -> Mapping[str, object]:
    """What a run says of its processes; nothing where there is one."""
    return {} if launch.size == 1 else {"ranks": launch.size, "distributed": kind}


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / _GB:.2f} GB"

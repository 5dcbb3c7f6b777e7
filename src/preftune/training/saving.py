"""Memory given for time and time for memory.

Checkpointing and offloading of activations: as the recipe says, or where the largest pack would not fit otherwise. Frozen
weights laid out twice more for products: where there is room in plenty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from preftune.core.errors import UsageError
from preftune.core.events import EventSink, Noted
from preftune.core.recipe import StageConfig
from preftune.core.records import TokenisedExample
from preftune.data.pack import Pack, cropped, pack_of
from preftune.modeling.activations import keep_layer_inputs, kept_bytes, own_part
from preftune.modeling.adapters import trainable_parameters
from preftune.modeling.forward import Scorer
from preftune.modeling.machine import MemoryLimit, memory_limit, resident_bytes
from preftune.training.state import StagePlan

SAMPLE_TOKENS = 1024
BACKWARD = 1.3  # gradients of one layer and what its products need beside what forward kept
FULL = 0.85  # of the memory: the same bound as the warning of the preflight
SPARE = 0.1
"""Of the memory, what copies of frozen weights may take: they save a tenth of the products' time and nothing else."""
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Need:
    """What a stage is expected to take if every activation is kept, in bytes.

    Parameters
        held: what the process (CPU) or the allocator (GPU) holds now. activations: of the largest pack, of ``tokens``.
        state: gradients, moments and masters of what is trained.
    """

    held: int
    activations: int
    state: int
    tokens: int

    @property
    def total(self) -> int:
        """All of it at the peak."""
        return self.held + int(BACKWARD * self.activations) + self.state


def save_memory(stage: StagePlan, scorer: Scorer, sink: EventSink) -> dict[str, object]:
    """Switch checkpointing and offloading on where the stage asks for them or needs them; the facts of what was done.

    Raises
        UsageError: the model's layers cannot be checkpointed, or there is no GPU whose activations could go to the host.
    """
    config = stage.config
    place = None if config.activation_offloading == "off" else config.activation_offloading
    if place == "host" and scorer.device.type != "cuda":
        raise UsageError(
            f"stage {config.name}: activation_offloading: host moves activations from a GPU to the machine's memory, and this "
            "stage runs on the CPU; write disk or off"
        )
    checkpointing, limit = config.gradient_checkpointing, memory_limit(scorer.device)
    need = need_of(scorer, config, stage.train + stage.select) if limit is not None and _is_asked(config, scorer) else None
    if place is not None:
        checkpointing = "on"
    elif checkpointing == "auto":
        # processes of one host share its memory, and all must compute alike, because they gather weights together
        sharers = stage.ranks.launch.local_size if scorer.device.type == "cpu" else 1
        is_tight = limit is not None and need is not None and need.total * sharers > FULL * limit.num_bytes
        checkpointing = "on" if stage.ranks.any(is_so=is_tight) else "off"
        if limit is not None and need is not None and checkpointing == "on":
            sink(Noted("info", "checkpointing", _why(config, need, limit)))
    if checkpointing == "on":
        try:
            keep_layer_inputs(scorer.model, place, stage.folder / "activations")
        except ValueError as error:
            raise UsageError(
                f"stage {config.name}: gradient_checkpointing: {str(error).splitlines()[0]} Write gradient_checkpointing: 'off'"
            ) from None
    laid_out = _lay_out(stage, scorer, limit, need) if checkpointing == "off" else 0
    return {
        "gradient_checkpointing": checkpointing,
        "activation_offloading": config.activation_offloading,
        "laid_out_weights_bytes": laid_out,
    }


def _is_asked(config: StageConfig, scorer: Scorer) -> bool:
    """Whether anything depends on what the largest pack needs; to find that costs a forward pass."""
    if config.gradient_checkpointing == "auto":
        return config.activation_offloading == "off"
    return config.gradient_checkpointing == "off" and scorer.bytes_to_lay_out > 0


def _lay_out(stage: StagePlan, scorer: Scorer, limit: MemoryLimit | None, need: Need | None) -> int:
    """Lay the frozen weights out for products where that is a small part of the memory and all else fits; the bytes it took."""
    wanted, sharers = scorer.bytes_to_lay_out, stage.ranks.launch.local_size
    if not wanted or (limit is not None and wanted * sharers > SPARE * limit.num_bytes):
        return 0
    if limit is not None and need is not None and (need.total + wanted) * sharers > FULL * limit.num_bytes:
        return 0
    scorer.lay_out_weights()
    return wanted


def need_of(scorer: Scorer, config: StageConfig, examples: Sequence[TokenisedExample]) -> Need | None:
    """What the largest pack will need, from one forward pass of some of its tokens; None where there is nothing to train."""
    if not examples:
        return None
    sizes = sorted((one.num_tokens for one in examples), reverse=True)
    largest = max(sizes[0], min(config.tokens_per_pack, sum(sizes[: config.pairs_per_step])))
    sample = sample_pack(examples)
    activations = kept_bytes(scorer, sample) * largest // max(1, len(sample.ids))
    return Need(held_bytes(scorer.device), activations, _state_bytes(scorer.model, config), largest)


def sample_pack(examples: Sequence[TokenisedExample]) -> Pack:
    """About a thousand tokens of the longest examples; what one of them keeps a token is what a long one keeps."""
    chosen: list[TokenisedExample] = []
    room = SAMPLE_TOKENS
    for example in sorted(examples, key=lambda one: -one.num_tokens):
        if chosen and example.num_tokens > room:
            break
        chosen.append(cropped(example, SAMPLE_TOKENS))
        room -= chosen[-1].num_tokens
    return pack_of(chosen)


def held_bytes(device: torch.device) -> int:
    """Memory that is taken now: of the GPU's allocator, or of this process."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident_bytes()


def _state_bytes(model: nn.Module, config: StageConfig) -> int:
    """A gradient, two moments and, of narrow weights, a master: float32, but for moments of 8 bits."""
    moments = 8 if config.optimizer == "adamw" else 2
    parts = [own_part(one) for one in trainable_parameters(model).values()]
    return sum(one.numel() * (moments + (4 if one.dtype == torch.float32 else 8)) for one in parts)


def _why(config: StageConfig, need: Need, limit: MemoryLimit) -> str:
    return (
        f"stage {config.name}: its largest pack of {need.tokens} tokens would keep {need.activations / _GB:.2f} GB for backward, "
        f"{need.total / _GB:.2f} GB in all, and the {limit.what} is {limit.num_bytes / _GB:.2f} GB; so only the inputs of layers "
        "are kept and the rest is computed again (gradient_checkpointing: 'off' keeps everything)"
    )

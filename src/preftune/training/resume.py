"""From a trainee to a checkpoint and back, with proof that the checkpoint belongs to this run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from preftune.core.errors import CheckpointError
from preftune.core.events import CheckpointSaved, EventSink, Noted
from preftune.core.version import __version__
from preftune.modeling.lineage import save_model
from preftune.training.checkpoint import (
    folder_of,
    generator_state,
    latest,
    load_checkpoint,
    prune,
    restore_generators,
    save_checkpoint,
)
from preftune.training.prepare import Trainee, rank_seed, seed_generators
from preftune.training.ranks import Ranks
from preftune.training.state import StagePlan, TrainState

# what must agree, and how an error calls it
IDENTITIES = {
    "recipe_digest": "recipe",
    "data_digest": "training data",
    "reference": "reference model",
    "order_seed": "seed",
    "num_steps": "number of steps",
    "epoch": "position",
    "index": "position",
}
ARITHMETIC = ("device", "threads", "precision", "layout", "ranks", "distributed")  # facts of a run; the last two of several ranks
SELECTION = ("best_step", "best_value", "evals_without_gain", "num_evals", "ended")


def save(stage: StagePlan, trainee: Trainee, state: TrainState, sink: EventSink) -> Path:
    """Write the checkpoint of this step, delete those that are too many, and say so."""
    root, ranks, spread = stage.folder / "checkpoints", stage.ranks, trainee.spread
    parameters, moments = spread.whole(trainee.optimiser.masters), spread.whole(trainee.optimiser.tensors())
    generators = _generators_of_all(ranks)
    reference = spread.whole({} if trainee.reference is None else trainee.reference.tensors())
    with spread.gathered(is_adapter_enough=stage.config.adapter == "lora"):
        if ranks.is_first:
            save_checkpoint(
                root,
                state.step,
                facts=_facts(stage, trainee, state),
                parameters=parameters,
                moments=moments,
                write_model=lambda folder: save_model(trainee.model, stage.loaded.tokenizer, folder),
                generators=generators,
                reference=reference,
            )
            prune(root, stage.config.keep_checkpoints, state.best_step if stage.config.keep == "best" else 0)
    ranks.wait()
    path = folder_of(root, state.step)
    sink(CheckpointSaved(stage.config.name, state.step, str(path)))
    return path


def _generators_of_all(ranks: Ranks) -> dict[str, Tensor]:
    """The generators of this process, and on the first rank those of the others under ``rankN/``."""
    own = generator_state()
    told = ranks.gather(b"" if ranks.is_first else dump_tensors(own))
    others = {
        f"rank{rank}/{name}": tensor
        for rank, content in enumerate(told)
        if content and rank
        for name, tensor in load_tensors(content).items()
    }
    return own | others


def _own_generators(held: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What a checkpoint holds of one rank's generators; empty where it had fewer ranks."""
    prefix = f"rank{rank}/" if rank else ""
    names = (name for name in held if name.startswith(prefix) and (rank or not name.startswith("rank")))
    return {name.removeprefix(prefix): held[name] for name in names}


def restore(stage: StagePlan, trainee: Trainee, sink: EventSink) -> TrainState:
    """Where the stage stands: at its latest checkpoint if the plan says resume, else at the start.

    Model, optimiser and generators are put back as they were.

    Raises
        CheckpointError: the checkpoint is damaged or belongs to another run.
    """
    path = latest(stage.folder / "checkpoints") if stage.resume else None
    if path is None:
        return TrainState()
    checkpoint = load_checkpoint(path)
    facts = checkpoint.facts
    loss_state = {name: float(value) for name, value in facts.get("loss_state", {}).items()}
    selection = facts.get("selection", {})
    state = TrainState(int(facts["step"]), int(facts["num_tokens"]), float(facts["seconds"]), loss_state, **selection)
    expected = _facts(stage, trainee, state)
    for key, what in IDENTITIES.items():
        if facts.get(key) != expected[key]:
            raise CheckpointError(
                f"checkpoint {path} was made with another {what}; resume with that of its run, or start a new run"
            )
    now, then = expected["arithmetic"], facts["arithmetic"]
    moved = [key for key in sorted({*now, *then}) if now.get(key) != then.get(key)]
    if moved:
        words = f"{', '.join(moved)} changed since the checkpoint: the run goes on, but not bit for bit as it would have"
        sink(Noted("warning", "not_bit_exact", words))
    trainee.optimiser.load(checkpoint.parameters, checkpoint.moments)
    if trainee.reference is not None:
        trainee.reference.load(checkpoint.reference)
    own = _own_generators(checkpoint.generators, stage.ranks.rank)
    if own:
        restore_generators(own)
    else:
        seed_generators(rank_seed(stage.seed, stage.ranks.rank) + state.step)
    return state


def load_best(stage: StagePlan, trainee: Trainee, state: TrainState) -> int:
    """Put the weights of the best evaluation back where the recipe keeps them; the step whose weights the model has."""
    if stage.config.keep == "last" or state.best_step in (0, state.step):
        return state.step
    checkpoint = load_checkpoint(folder_of(stage.folder / "checkpoints", state.best_step))
    trainee.optimiser.load(checkpoint.parameters, checkpoint.moments)
    return state.best_step


def _facts(stage: StagePlan, trainee: Trainee, state: TrainState) -> dict[str, Any]:
    """What a checkpoint says of position and identity."""
    epoch, index = trainee.order.position(state.step)
    return {
        "epoch": epoch,
        "index": index,
        "order_seed": trainee.order.seed,
        "num_steps": trainee.num_steps,
        "num_tokens": state.num_tokens,
        "seconds": state.seconds,
        "loss_state": dict(state.loss_state),
        "selection": {name: getattr(state, name) for name in SELECTION},
        "recipe_digest": stage.recipe_digest,
        "data_digest": trainee.data_digest,
        "reference": None if trainee.reference is None else trainee.reference.identity,
        "arithmetic": {
            "torch": torch.__version__,
            "preftune": __version__,
            **{key: trainee.facts[key] for key in ARITHMETIC if key in trainee.facts},
        },
    }

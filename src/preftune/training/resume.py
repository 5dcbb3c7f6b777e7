"""From a trainee to a checkpoint and back, with proof that the checkpoint belongs to this run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from preftune.core.errors import CheckpointError
from preftune.core.events import CheckpointSaved, EventSink, Noted
from preftune.core.version import __version__
from preftune.modeling.lineage import save_model
from preftune.training.checkpoint import folder_of, latest, load_checkpoint, prune, restore_generators, save_checkpoint
from preftune.training.prepare import Trainee, data_digest
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
SELECTION = ("best_step", "best_value", "evals_without_gain", "num_evals", "ended")


def save(stage: StagePlan, trainee: Trainee, state: TrainState, sink: EventSink) -> Path:
    """Write the checkpoint of this step, delete those that are too many, and say so."""
    root = stage.folder / "checkpoints"
    path = save_checkpoint(
        root,
        state.step,
        facts=_facts(stage, trainee, state),
        parameters=trainee.optimiser.masters,
        moments=trainee.optimiser.tensors(),
        write_model=lambda folder: save_model(trainee.model, stage.loaded.tokenizer, folder),
    )
    prune(root, stage.config.keep_checkpoints, state.best_step if stage.config.keep == "best" else 0)
    sink(CheckpointSaved(stage.config.name, state.step, str(path)))
    return path


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
    moved = [key for key, value in expected["arithmetic"].items() if facts["arithmetic"].get(key) != value]
    if moved:
        words = f"{', '.join(moved)} changed since the checkpoint: the run goes on, but not bit for bit as it would have"
        sink(Noted("warning", "not_bit_exact", words))
    trainee.optimiser.load(checkpoint.parameters, checkpoint.moments)
    restore_generators(checkpoint.generators)
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
        "data_digest": data_digest(stage.train),
        "reference": None if trainee.reference is None else trainee.reference.identity,
        "arithmetic": {
            "torch": torch.__version__,
            "preftune": __version__,
            **{key: trainee.facts[key] for key in ("device", "threads", "precision", "layout")},
        },
    }

"""The one loop. Everything that is trained is trained here, whatever the method."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from preftune.core.errors import CheckpointError, Interrupted, NonFiniteLoss
from preftune.core.events import EventSink, Noted, StageFinished, StageStarted, StepDone, ignore
from preftune.core.files import read_json, write_folder, write_json
from preftune.data.pack import Pack
from preftune.modeling.lineage import save_model
from preftune.training.ahead import ahead_of
from preftune.training.checkpoint import steps_in, why_not_written
from preftune.training.devices import deterministic, peak_memory_bytes
from preftune.training.invariants import not_finite
from preftune.training.journal import Journal
from preftune.training.order import evenly_spaced
from preftune.training.prepare import Trainee, prepare, rank_seed, seed_generators
from preftune.training.resume import load_best, restore, save
from preftune.training.selection import check_selectable
from preftune.training.state import StagePlan, StageResult, TrainState
from preftune.training.step import find_culprits, train_step
from preftune.training.stopping import StopRequest
from preftune.training.watch import Watch

RESULT = "result.json"


def run_stage(stage: StagePlan, sink: EventSink = ignore) -> StageResult:
    """Train one stage to its end and save its model in ``folder/final``.

    Random generators of the process are seeded. With ``resume`` a stage that ended is returned as it ended, and one
    that did not goes on from its latest checkpoint, bit for bit as if it had never stopped (on a CPU with the same
    threads and versions).

    Raises
        Interrupted: SIGTERM or SIGINT; the step was finished and a checkpoint written.
        NonFiniteLoss: before the optimiser step; the message names the pairs.
        CheckpointError: a checkpoint that cannot be written, or one that is damaged or of another run.
        InvariantBroken: the policy does not start as its reference.
    """
    config, ranks = stage.config, stage.ranks
    finished = _finished(stage)
    if finished is not None:
        return finished
    check_selectable(config, len(stage.select))
    with StopRequest() as stop:
        # ---- the model, its order, the reference's scores, and proof that policy and reference start equal ----------
        trainee = prepare(stage, sink, should_stop=lambda: bool(stop))
        num_steps = trainee.num_steps
        saves = evenly_spaced(num_steps, config.checkpoints, with_end=False)

        # ---- where an earlier process stopped, or the start ---------------------------------------------------------
        seed_generators(rank_seed(stage.seed, ranks.rank))
        state = restore(stage, trainee, sink)
        journal = Journal(stage.folder / "metrics.jsonl" if ranks.is_first else None, state.step)
        resumed_from, started = state.step, time.monotonic() - state.seconds
        sink(StageStarted(config.name, num_steps, {**trainee.facts, "resumed_from": resumed_from}))
        watch = Watch(stage, trainee, journal, sink, state.step)
        trainee.model.train()

        with ahead_of(stage, trainee, state.step) as ahead, deterministic(trainee.device, is_wanted=config.deterministic):
            while state.step < num_steps and not state.ended:
                # ---- one optimiser step over the packs of its examples ----------------------------------------------
                clock = time.monotonic()
                packs, objective = ahead.take(state.step)
                lr = trainee.schedule.at(state.step)
                margins: list[float] = []
                try:
                    metrics = train_step(
                        objective,
                        packs,
                        trainee.optimiser,
                        lr=lr,
                        max_grad_norm=config.max_grad_norm,
                        loss_state=state.loss_state,
                        margins=margins,
                    )
                except NonFiniteLoss as error:
                    raise _named(stage, trainee, packs, state, error) from None
                state.step += 1
                metrics |= trainee.reference.after_step(state.step) if trainee.reference is not None else {}
                state.num_tokens += sum(len(pack.ids) for pack in packs)
                state.seconds = time.monotonic() - started

                # ---- its metrics, on the disk before anybody is told ------------------------------------------------
                (peak,) = ranks.highest(peak_memory_bytes(trainee.device))
                metrics |= _speed(trainee, state, packs, time.monotonic() - clock) | {"peak_memory_gb": peak / 1e9}
                journal.add(state.step, metrics)
                watch.after_step(state.step, metrics, packs, margins)
                sink(StepDone(config.name, state.step, metrics))

                # ---- a few times a stage: held-out examples and the probe; the end, if they or somebody say so -------
                is_best = watch.look(state, metrics["epoch"])
                # every rank hears what any other was told, so that all stop after the same step
                asked, is_best_somewhere, is_ended = ranks.highest(bool(stop), is_best, bool(state.ended or stage.stop_reason()))
                state.ended = str(ranks.from_first(state.ended or stage.stop_reason())) if is_ended else ""

                # ---- a few times a stage, and when somebody asks the run to stop: a checkpoint ----------------------
                is_stopping = bool(asked) and state.step < num_steps and not state.ended
                if state.step in saves or is_stopping or is_best_somewhere:
                    state.seconds = time.monotonic() - started
                    path = save(stage, trainee, state, sink)
                if is_stopping:
                    who = stop.signal_name or "a signal to another rank"
                    raise Interrupted(
                        f"stage {config.name} stopped by {who} after step {state.step} of {num_steps}; "
                        f"{path} holds it, resume the run to go on"
                    )

        # ---- the end: the model, and then the word that it is there -------------------------------------------------
        if state.ended:
            sink(Noted("info", "ended_early", f"stage {config.name} ended after step {state.step} of {num_steps}: {state.ended}"))
        facts = trainee.facts | watch.cost(time.monotonic() - started)
        result = _finish(stage, trainee, state, journal.last, resumed_from, facts)
        sink(StageFinished(config.name, state.step, str(result.final)))
        return result


def _speed(trainee: Trainee, state: TrainState, packs: list[Pack], seconds: float) -> dict[str, float]:
    """Progress and speed of one step, beside its metrics."""
    return {
        "epoch": state.step / trainee.order.steps_per_epoch,
        "num_tokens": float(state.num_tokens),
        "pairs_per_second": sum(pack.num_groups for pack in packs) / seconds,
        "tokens_per_second": sum(len(pack.ids) for pack in packs) / seconds,
        "elapsed_s": state.seconds,
    }


def _named(stage: StagePlan, trainee: Trainee, packs: list[Pack], state: TrainState, error: NonFiniteLoss) -> NonFiniteLoss:
    """The same error with the examples at fault in its message and in ``nonfinite.json``."""
    step = state.step
    broken = not_finite(trainee.model)
    if broken:
        return _of_weights(stage, packs, step, error, broken)
    found = find_culprits(trainee.objective.at(state.loss_state), packs, trainee.optimiser)
    whole = [(example, "part of the step") for pack in packs for example in pack.examples]
    rows = [
        {"file": one.provenance.file, "line": one.provenance.line, "example_id": one.example_id, "gave": gave}
        for one, gave in found or whole
    ]
    path = stage.folder / "nonfinite.json"
    if stage.ranks.is_first:
        write_json(path, {"stage": stage.config.name, "step": step + 1, "is_alone": bool(found), "examples": rows})
    first, others = rows[0], f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    alone = "at fault" if found else "none is at fault alone, the step held"
    return NonFiniteLoss(
        f"stage {stage.config.name}, step {step + 1}: {error}, so the optimiser took no step; {alone}: "
        f"{first['file']}:{first['line']} (example {first['example_id']}, {first['gave']}){others}, see {path}; "
        "mend or remove those rows, or lower lr"
    )


def _of_weights(stage: StagePlan, packs: list[Pack], step: int, error: NonFiniteLoss, broken: list[str]) -> NonFiniteLoss:
    """Where weights are not finite no row is at fault, and every pair would give the same."""
    pairs = sorted((one for pack in packs for one in pack.examples), key=lambda one: (one.provenance.file, one.provenance.line))
    rows = [{"file": one.provenance.file, "line": one.provenance.line, "example_id": one.example_id} for one in pairs]
    path = stage.folder / "nonfinite.json"
    if stage.ranks.is_first:
        write_json(path, {"stage": stage.config.name, "step": step + 1, "weights": broken, "examples": rows})
    first = pairs[0].provenance
    return NonFiniteLoss(
        f"stage {stage.config.name}, step {step + 1}: {error}, so the optimiser took no step; the weights are at fault, not the "
        f"rows: {len(broken)} tensors are not finite, first {broken[0]}; the step held {len(pairs)} examples, first "
        f"{first.file}:{first.line}, see {path}; go on from an earlier checkpoint with a lower lr, or a smaller max_grad_norm"
    )


def _finish(
    stage: StagePlan,
    trainee: Trainee,
    state: TrainState,
    last: Mapping[str, float],
    resumed_from: int,
    facts: Mapping[str, object],
) -> StageResult:
    final = stage.folder / "final"
    kept_step = load_best(stage, trainee, state)
    with trainee.spread.gathered(is_adapter_enough=stage.config.adapter == "lora"):
        if stage.ranks.is_first:
            _write_final(trainee, stage, final)
    (peak,) = stage.ranks.highest(peak_memory_bytes(trainee.device))
    outcome: dict[str, Any] = {
        "steps": state.step,
        "kept_step": kept_step,
        "best_value": state.best_value,
        "ended": state.ended,
        "metrics": dict(last),
        "peak_memory_bytes": int(peak),
        "seconds": state.seconds,
    }
    if stage.ranks.is_first:
        write_json(stage.folder / RESULT, {"recipe_digest": stage.recipe_digest, **outcome})
    stage.ranks.wait()
    num_forwards = 0 if trainee.reference is None else trainee.reference.num_forwards
    return StageResult(stage.folder, final, reference_forwards=num_forwards, resumed_from=resumed_from, facts=facts, **outcome)


def _write_final(trainee: Trainee, stage: StagePlan, final: Path) -> None:
    try:
        with write_folder(final) as folder:
            save_model(trainee.model, stage.loaded.tokenizer, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{final} cannot be written: {why_not_written(error)}; free some space and resume") from error


def _finished(stage: StagePlan) -> StageResult | None:
    """The result of a stage that ended in an earlier process, or None; another run's folder is refused."""
    path, final, root = stage.folder / RESULT, stage.folder / "final", stage.folder / "checkpoints"
    if not stage.resume:
        if path.is_file() or steps_in(root):
            raise CheckpointError(f"{stage.folder} holds an earlier run of this stage; resume it, or choose another folder")
        return None
    if not (path.is_file() and final.is_dir()):
        return None
    kept: dict[str, Any] = read_json(path)
    if kept.pop("recipe_digest") != stage.recipe_digest:
        raise CheckpointError(f"{stage.folder} was trained with another recipe; resume with that one, or start a new run")
    return StageResult(stage.folder, final, reference_forwards=0, resumed_from=kept["steps"], **kept)

"""The process that rehearses: ``python -m preftune.app.probe_process FOLDER`` reads a request and writes what it measured.

It is a process of its own so that the peak of memory is exact, and so that running out of memory ends nothing else.
What it writes is there stage by stage; a process that died leaves the stages before.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from preftune.core.errors import PreftuneError
from preftune.core.files import read_json, write_json
from preftune.core.loading import own_process
from preftune.core.recipe import ModelConfig, StageConfig
from preftune.core.records import TokenisedExample
from preftune.training.rehearsal import Sample

REQUEST, RESULT = "request.json", "result.json"
OUT_OF_MEMORY = ("can't allocate memory", "can't start new thread", "out of memory", "bad_alloc", "Cannot allocate memory")


@dataclass(frozen=True, slots=True)
class StageRequest:
    """One stage to rehearse.

    Parameters
        start: the model that it starts from; None for what the stage before it leaves.
        sample: what to run. examples: for the model's competence, empty to leave that out. entropy: of the data.
        reference: the model that the stage names as its reference.
    """

    config: StageConfig
    start: ModelConfig | None
    sample: Sample | None
    examples: tuple[TokenisedExample, ...]
    entropy: float | None
    reference: ModelConfig | None = None


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """Everything that the process needs.

    Parameters
        template: the recipe's model section, whose dtype and chat template apply to every stage.
        limit_bytes: allocations beyond it fail; None for no limit. has_allocator: the trainer's allocator settings.
    """

    stages: tuple[StageRequest, ...]
    template: ModelConfig
    seed: int
    limit_bytes: int | None
    has_allocator: bool


def main(folder: Path) -> int:
    """Rehearse every stage; 0 done, 1 a stage failed and the result says how."""
    own_process()
    request = TypeAdapter(ProbeRequest).validate_python(read_json(folder / REQUEST))
    result: dict[str, Any] = {"stages": [], "error": None, "is_memory": False}
    try:
        _run(request, folder, result)
    except (PreftuneError, RuntimeError, MemoryError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        is_memory = isinstance(error, MemoryError) or any(word in text for word in OUT_OF_MEMORY)
        write_json(folder / RESULT, {**result, "error": text[:500], "is_memory": is_memory})
        return 1
    write_json(folder / RESULT, result)
    return 0


def _run(request: ProbeRequest, folder: Path, result: dict[str, Any]) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from preftune.modeling.load import load_model
    from preftune.modeling.machine import limit_memory
    from preftune.training.competence import measure_competence
    from preftune.training.devices import choose_precision, set_allocator

    if request.has_allocator:
        set_allocator()
    if request.limit_bytes is not None:
        limit_memory(request.limit_bytes)
    before = request.template
    for index, stage in enumerate(request.stages):
        start = stage.start or before
        place = folder / f"stage-{index}"
        measured: dict[str, Any] = {"rehearsal": None, "competence": None}
        if stage.sample is not None:
            measured["rehearsal"] = _rehearse(stage, stage.sample, start, place, request.seed)
            gc.collect()
        if stage.examples:
            # after the rehearsal: the memory of answers is no part of training's
            precision = choose_precision(start.dtype, stage.config.adapter)
            loaded = load_model(start, precision=precision)
            measured["competence"] = asdict(
                measure_competence(loaded.model, stage.examples, stage.entropy, tokenizer=loaded.tokenizer)
            )
            del loaded
        result["stages"].append(measured)
        write_json(folder / RESULT, result)
        if stage.sample is not None:
            before = start.model_copy(update={"name": str(place / "final"), "revision": None})


def _rehearse(stage: StageRequest, sample: Sample, start: ModelConfig, place: Path, seed: int) -> Mapping[str, Any]:
    from preftune.modeling.load import load_model
    from preftune.modeling.machine import resident_bytes
    from preftune.training.devices import choose_device, choose_precision
    from preftune.training.rehearsal import rehearse
    from preftune.training.state import StagePlan

    choose_device()
    base, started = resident_bytes(), time.perf_counter()
    loaded = load_model(start, precision=choose_precision(start.dtype, stage.config.adapter))
    plan = StagePlan(
        config=stage.config,
        loaded=loaded,
        train=[],
        select=[],
        folder=place,
        seed=seed,
        recipe_digest="rehearsal",
        cache_folder=place / "cache",
        reference=stage.reference,
    )
    return asdict(rehearse(plan, sample, loaded_in=time.perf_counter() - started, base_bytes=base))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

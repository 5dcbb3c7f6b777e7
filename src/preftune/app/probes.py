"""Probes: what a model can do, and how much memory and time a run will take, measured in a process of its own.

Results are kept by content: the same packs on the same weights, versions and machine are not measured twice, so
``plan`` and then ``train`` pay once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from preftune.app.context import Context
from preftune.core.errors import Finding
from preftune.core.events import EventSink, Progress, ignore
from preftune.core.files import read_json, write_json
from preftune.core.ids import digest_bytes, digest_file, digest_json
from preftune.core.recipe import ModelConfig, Recipe, StageConfig
from preftune.core.records import TokenisedExample
from preftune.core.version import __version__

if TYPE_CHECKING:
    from preftune.app.probe_process import ProbeRequest
    from preftune.modeling.load import LoadedModel
    from preftune.modeling.machine import MemoryLimit
    from preftune.training.competence import Competence
    from preftune.training.model_files import Shapes
    from preftune.training.rehearsal import Prediction, Sample

ProbeMode: TypeAlias = Literal["off", "worthwhile", "small", "on"]
"""off; where a run is long enough to be worth it; where the model is small enough; always."""

LONG_WORK = 3e13  # operations: about five minutes on two cores; shorter runs are over before a probe would pay
SMALL_MODEL = {"full": 400_000_000, "lora": 1_500_000_000}
TIGHT = 0.85
LONG_RUN_S = 86_400.0
WHOLE_FILE = 1 << 28  # weight files up to this are digested whole
_GB = 1e9
_OFF = "off"


@dataclass(frozen=True, slots=True)
class StageProbe:
    """What was found of one stage; None where it was not looked at."""

    prediction: Prediction | None
    competence: Competence | None
    device: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        prediction = None if self.prediction is None else {**asdict(self.prediction), "seconds": self.prediction.seconds}
        return {
            "device": self.device,
            "prediction": prediction,
            "competence": None if self.competence is None else asdict(self.competence),
        }


@dataclass(frozen=True, slots=True)
class Probed:
    """What the probes found: by stage, the findings, and why nothing was probed (``skipped``, empty where it was)."""

    stages: list[StageProbe] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    skipped: str = ""

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that any stage is predicted to take."""
        peaks = [one.prediction.peak_bytes for one in self.stages if one.prediction is not None]
        return max(peaks, default=None)

    def summary(self, names: Sequence[str]) -> list[str]:
        """What a person reads."""
        if self.skipped:
            return [f"not rehearsed: {self.skipped}"]
        lines: list[str] = []
        for name, stage in zip(names, self.stages, strict=False):
            if stage.prediction is not None:
                one = stage.prediction
                lines.append(
                    f"stage {name}: predicted {one.peak_bytes / _GB:.2f} GB and {duration(one.seconds)} on {stage.device} "
                    f"(reference {duration(one.reference_s)}, training {duration(one.training_s)}, "
                    f"held out {duration(one.evaluation_s)}, probe {duration(one.probing_s)})"
                )
            if stage.competence is not None:
                found = stage.competence
                against = "" if found.entropy is None else f" (their frequencies: {found.entropy:.2f})"
                lines.append(
                    f"stage {name}: the model gives chosen completions {found.nll:.2f} nats a token{against}; "
                    f"{found.num_ended} of {found.num_answers} greedy answers end by themselves"
                )
        return lines


@dataclass(frozen=True, slots=True)
class ProbeTask:
    """A recipe to probe.

    Parameters
        data: the tokenised training and held-out examples of each stage. starts: the model of each stage, None for what
            the stage before leaves. shapes: of the first model's weights.
    """

    recipe: Recipe
    data: Sequence[tuple[Sequence[TokenisedExample], Sequence[TokenisedExample]]]
    starts: Sequence[ModelConfig | None]
    shapes: Shapes | None
    context: Context


def probe(
    task: ProbeTask, mode: ProbeMode, limit: MemoryLimit | None, sink: EventSink = ignore, *, is_memory_only: bool = False
) -> Probed:
    """Rehearse the stages and ask the model, where the mode wants it; otherwise compare weights with memory alone.

    ``PREFTUNE_PROBE=off`` in the environment switches everything off that is not asked for with ``on``.
    """
    findings = _check_least(task, limit)
    skipped = _why_skipped(task, mode)
    if skipped or findings:
        return Probed(findings=findings, skipped=skipped or "it cannot fit")
    sink(Progress("rehearsing the largest packs", 0, 1))
    samples, request = _request(task, is_memory_only=is_memory_only)
    result = _measured(task, request)
    sink(Progress("rehearsing the largest packs", 1, 1))
    stages = _stages(task, samples, result)
    return Probed(stages, _findings(task, stages, result, limit))


def limit_or_machine(memory: int | None) -> MemoryLimit | None:
    """The limit that the user gave in bytes, or what the machine has."""
    from preftune.modeling.machine import MemoryLimit, memory_limit
    from preftune.training.devices import choose_device

    return memory_limit(choose_device()) if memory is None else MemoryLimit(memory, "limit that was given")


def ask_model(config: StageConfig, loaded: LoadedModel, train: Sequence[TokenisedExample]) -> list[Finding]:
    """Whether the model that a stage starts from can do the task, asked in this process: likelihood alone, no answers."""
    from preftune.training.competence import check_competence, choose_examples, measure_competence, unigram_entropy

    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    measured = measure_competence(loaded.model, choose_examples(train, size), unigram_entropy(train))
    return check_competence(config, measured)


def is_switched_off(mode: ProbeMode) -> bool:
    """Whether nothing at all is to be asked of the model: by the mode, or by ``PREFTUNE_PROBE=off``."""
    return mode == "off" or (mode != "on" and os.environ.get("PREFTUNE_PROBE", "").lower() == _OFF)


def _why_skipped(task: ProbeTask, mode: ProbeMode) -> str:
    from preftune.training.model_files import num_parameters_of

    if mode == "on":
        return ""
    if is_switched_off(mode):
        return "switched off"
    if task.shapes is None:
        return "the model is on the hub; --probe loads it"
    size = num_parameters_of(task.recipe.model.name) or 0
    for config, (train, _) in zip(task.recipe.stages, task.data, strict=True):
        if size > SMALL_MODEL[config.adapter]:
            return f"the model has {size / _GB:.1f} billion weights; --probe rehearses it all the same"
        if not train:
            return f"stage {config.name} has no data"
    tokens = sum(config.epochs * sum(one.num_tokens for one in train) for config, (train, _) in _configs(task))
    if mode == "worthwhile" and 6.0 * size * tokens < LONG_WORK:
        return "the run is short; --probe rehearses it all the same"
    return ""


def _configs(task: ProbeTask) -> Any:
    return zip(task.recipe.stages, task.data, strict=True)


def _request(task: ProbeTask, *, is_memory_only: bool) -> tuple[list[Sample], ProbeRequest]:
    from preftune.app.plan import reference_model
    from preftune.app.probe_process import ProbeRequest, StageRequest
    from preftune.modeling.machine import memory_limit
    from preftune.training.competence import choose_examples, unigram_entropy
    from preftune.training.devices import choose_device, has_allocator
    from preftune.training.model_files import num_parameters_of
    from preftune.training.rehearsal import choose_sample

    size = num_parameters_of(task.recipe.model.name) or 0
    samples: list[Sample] = []
    stages: list[StageRequest] = []
    for (config, (train, select)), start in zip(_configs(task), task.starts, strict=True):
        sample = choose_sample(config, train, select, task.recipe.seed)
        samples.append(replace(sample, steps=(), select=()) if is_memory_only else sample)
        examples = choose_examples(train, size) if start is not None and not is_memory_only else []
        other = reference_model(task.recipe, config)
        stages.append(StageRequest(config, start, samples[-1], tuple(examples), unigram_entropy(train), other))
    device = choose_device()
    machine = None if device.type == "cuda" else memory_limit(device)
    limit = None if machine is None else machine.num_bytes
    return samples, ProbeRequest(tuple(stages), task.recipe.model, task.recipe.seed, limit, has_allocator())


def _measured(task: ProbeTask, request: ProbeRequest) -> Mapping[str, Any]:
    """What the process of its own found, or what an earlier one found of the same."""
    from pydantic import TypeAdapter

    from preftune.app.probe_process import REQUEST, RESULT, ProbeRequest

    content = TypeAdapter(ProbeRequest).dump_python(request, mode="json")
    folder = task.context.cache / "probes"
    kept = folder / f"{_key(task, content)}.json"
    if kept.is_file():
        return dict(read_json(kept))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as name:
        place = Path(name)
        write_json(place / REQUEST, content)
        command = [sys.executable, "-m", "preftune.app.probe_process", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603 -- our own module
        result: dict[str, Any] = {"stages": [], "error": None, "is_memory": False}
        if (place / RESULT).is_file():
            result = dict(read_json(place / RESULT))
        if done.returncode != 0 and result["error"] is None:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            killed = done.returncode in {-9, 137}
            said = "it was killed, as the system does where memory runs out" if killed else f"it ended with {last[:300]}"
            return {**result, "error": said, "is_memory": killed, "is_ours": not killed}
    if result["error"] is None:
        write_json(kept, result)
    return result


def _key(task: ProbeTask, content: Mapping[str, Any]) -> str:
    """Digest of everything that a measurement depends on."""
    from importlib.metadata import version

    import torch

    from preftune.modeling.machine import cpu_count
    from preftune.training.devices import choose_device

    device = choose_device()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} of {cpu_count()}"
    asked = {key: value for key, value in content.items() if key != "limit_bytes"}
    names = [start.name for start in task.starts if start is not None]
    names += [one["reference"]["name"] for one in content["stages"] if one["reference"] is not None]
    models = [_model_digest(name) for name in names]
    return digest_json([asked, models, torch.__version__, version("transformers"), __version__, where])


def _model_digest(name: str) -> str:
    """Digest of a local model's files; of large ones the size, the time and both ends."""
    from preftune.training.model_files import folder_of

    folder = folder_of(name)
    if folder is None:
        return name
    parts: list[bytes] = []
    for path in sorted({*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")}):
        stat = path.stat()
        parts.append(path.name.encode())
        if stat.st_size <= WHOLE_FILE:
            parts.append(digest_file(path).encode())
            continue
        with path.open("rb") as file:
            head = file.read(1 << 20)
            file.seek(-(1 << 20), os.SEEK_END)
            parts += [head, file.read(), f"{stat.st_size} {stat.st_mtime_ns}".encode()]
    return digest_bytes(*parts)


def _stages(task: ProbeTask, samples: Sequence[Sample], result: Mapping[str, Any]) -> list[StageProbe]:
    from preftune.modeling.machine import resident_bytes
    from preftune.training.competence import Competence
    from preftune.training.rehearsal import Rehearsal, predict

    found: list[StageProbe] = []
    for config, sample, measured in zip(task.recipe.stages, samples, result["stages"], strict=False):
        rehearsal = Rehearsal(**measured["rehearsal"])
        competence = None if measured["competence"] is None else Competence(**measured["competence"])
        found.append(StageProbe(predict(rehearsal, sample, config, resident_bytes()), competence, rehearsal.device))
    return found


def _findings(
    task: ProbeTask, stages: Sequence[StageProbe], result: Mapping[str, Any], limit: MemoryLimit | None
) -> list[Finding]:
    from preftune.training.competence import NO_PROBE, check_competence

    findings: list[Finding] = []
    if result["error"] is not None:
        name = task.recipe.stages[min(len(stages), len(task.recipe.stages) - 1)].name
        fact = f"stage {name}: the dry run of its largest pack failed: {result['error']}"
        if result["is_memory"]:
            findings.append(Finding("blocker", "out_of_memory", fact, "`preftune plan RECIPE --fix` proposes what fits"))
        else:
            level: Literal["blocker", "warning"] = "warning" if result.get("is_ours") else "blocker"
            findings.append(Finding(level, "dry_run_failed", fact, f"mend what it says, or {NO_PROBE}"))
    for config, stage in zip(task.recipe.stages, stages, strict=False):
        if stage.competence is not None:
            findings += check_competence(config, stage.competence)
        if stage.prediction is not None:
            findings += check_memory(config.name, stage.prediction.peak_bytes, limit, "is predicted to take")
    seconds = sum(one.prediction.seconds for one in stages if one.prediction is not None)
    if seconds > LONG_RUN_S:
        fact = f"the run is predicted to take {duration(seconds)} on {stages[0].device}"
        findings.append(Finding("warning", "long_run", fact, "use fewer examples or epochs, a smaller model, or a GPU"))
    return findings


def check_memory(name: str, peak: int, limit: MemoryLimit | None, verb: str) -> list[Finding]:
    """A blocker where a stage's peak is above the limit, a warning where it is close to it."""
    if limit is None or peak <= TIGHT * limit.num_bytes:
        return []
    fact = f"stage {name} {verb} {peak / _GB:.2f} GB, and the {limit.what} is {limit.num_bytes / _GB:.2f} GB"
    way_out = "`preftune plan RECIPE --fix` proposes the setting that fits"
    if peak > limit.num_bytes:
        return [Finding("blocker", "memory", fact, way_out)]
    return [Finding("warning", "memory_tight", fact, way_out)]


def _check_least(task: ProbeTask, limit: MemoryLimit | None) -> list[Finding]:
    """Blockers that need no dry run: weights, gradients and the optimiser's moments alone are above the limit."""
    from preftune.training.devices import choose_precision
    from preftune.training.model_files import num_trainable

    if task.shapes is None or limit is None:
        return []
    import math

    size = sum(math.prod(shape) for shape in task.shapes.values())
    findings: list[Finding] = []
    for config in task.recipe.stages:
        width: float = 2 if choose_precision(task.recipe.model.dtype, config.adapter) == "bfloat16" else 4
        if task.recipe.model.load_in_4bit or task.recipe.model.load_in_8bit:
            width = 0.5 if task.recipe.model.load_in_4bit else 1
        masters = 4 if width == 2 and config.adapter == "full" else 0
        moments = 8 if config.optimizer == "adamw" else 2
        least = int(size * width) + num_trainable(config, task.shapes) * (4 + moments + masters)
        if least > limit.num_bytes:
            findings += check_memory(config.name, least, limit, "takes for weights, gradients and optimiser alone")
    return findings


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use.

    >>> duration(4.2), duration(150), duration(7200)
    ('4 s', '2.5 min', '2.0 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

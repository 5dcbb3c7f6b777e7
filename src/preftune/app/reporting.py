"""Gather what a report says from the run folder and the machine, and write it."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from preftune.app.stages.training import data_counts, with_made_pairs
from preftune.core.errors import InputError
from preftune.core.files import read_jsonl
from preftune.core.ids import digest_file, digest_json
from preftune.core.records import Excluded
from preftune.core.version import __version__

if TYPE_CHECKING:
    from preftune.app.contest import Contest
    from preftune.app.runs import RunFolder
    from preftune.evaluation.heldout import HeldOut
    from preftune.evaluation.report import Report, StageReport
    from preftune.evaluation.rounds import RoundResult
    from preftune.evaluation.winrate import WinRate
    from preftune.judging.base import Judge

MADE_FACTS = (
    "prompts",
    "samples",
    "pairs",
    "pairing",
    "mean_score",
    "margin",
    "length_ratio",
    "complete_share",
    "distinct_share",
)
SHOWN_FACTS = ("adapter", "start", "steps", "precision", "reference_forwards", "seconds", "peak_memory_bytes")
UNSAID = ("probe_cost",)  # notes that a reader of the report has no use for


@dataclass(frozen=True, slots=True)
class Findings:
    """What an evaluation found out; the report adds where it came from."""

    judge: Judge
    win_rate: WinRate
    same_judge: WinRate | None
    held_out: HeldOut | None
    uses: int
    timings: dict[str, float]
    rounds: tuple[RoundResult, ...] = ()


def make_report(contest: Contest, found: Findings) -> Report:
    """The record that the three forms of the report are written from."""
    from preftune.evaluation.report import Report, samples_of

    run, recipe = contest.run, contest.recipe
    record: dict[str, Any] = {} if run is None else run.read()
    stages = [] if run is None else [_stage_report(run, index, stage) for index, stage in enumerate(record["stages"])]
    notes = (
        [] if run is None else [str(row["message"]) for row in read_jsonl(run.path / "events.jsonl") if row["code"] not in UNSAID]
    )
    reason = contest.evaluation.same_judge_reason
    if reason is not None:
        notes = [f"The judge of this result was let pass although it may not be independent of the pairs: {reason}", *notes]
    timings = {**{f"stage {stage.name}": float(stage.facts.get("seconds", 0.0)) for stage in stages}, **found.timings}
    return Report(
        run=contest.folder.name if run is None else run.path.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        win_rate=found.win_rate,
        policy=contest.policy_label,
        baseline=_name_of(contest),
        pairs_win_rate=found.same_judge,
        held_out=found.held_out,
        stages=stages,
        counts={} if run is None else {stage.name: _counts(run, index, stage.name) for index, stage in enumerate(stages)},
        excluded=[] if run is None else _excluded(run),
        samples=samples_of(found.win_rate, found.judge, seed=recipe.seed),
        configuration=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        environment=environment(),
        seeds={"recipe": recipe.seed},
        digests=_digests(contest, found),
        timings=timings,
        uses=found.uses,
        notes=notes,
        rounds=found.rounds,
    )


def environment() -> dict[str, str]:
    """Versions and machine: what a reader needs to run it again."""
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "preftune": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
        "machine": f"{processor}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "system": platform.platform(),
    }


def _stage_report(run: RunFolder, index: int, stage: dict[str, Any]) -> StageReport:
    from preftune.evaluation.report import StageReport

    rows = read_jsonl(run.stage_folder(index, stage["name"]) / "metrics.jsonl")
    made = stage.get("made", {})
    told = {**{key: made[key] for key in MADE_FACTS if key in made}, **stage}
    if made:
        told["mean_score"] = made["score"]["mean"]
    facts = {key: told[key] for key in (*SHOWN_FACTS, *MADE_FACTS) if isinstance(told.get(key), (str, int, float))}
    return StageReport(stage["name"], stage["method"], facts, rows)


def _counts(run: RunFolder, index: int, name: str) -> dict[str, int]:
    return data_counts(run.stage_folder(index, name))


def _excluded(run: RunFolder) -> Sequence[Excluded]:
    keys = ("file", "line", "reason", "detail", "field", "excerpt")
    files = [run.path / "excluded.jsonl", *sorted(run.path.glob("stages/*/excluded.jsonl"))]
    return [Excluded(**{key: row[key] for key in keys}) for file in files for row in read_jsonl(file)]


def _digests(contest: Contest, found: Findings) -> dict[str, str]:
    digests = {
        "recipe": digest_json(contest.recipe.model_dump(mode="json")),
        "verdict prompts": found.win_rate.prompts_hash,
        "judge": str(found.win_rate.judge.get("identity", "")),
    }
    for role, config in (("policy", contest.policy), ("baseline", contest.baseline)):
        for file in sorted(Path(config.name).glob("*.safetensors")):
            digests[f"{role} {file.name}"] = digest_file(file)
    for index, stage in enumerate(contest.recipe.stages):
        data = (stage if contest.run is None else with_made_pairs(contest.recipe, index, contest.run)).data
        for path in data.train if data is not None else ():
            try:
                digests[f"data of {stage.name}: {Path(path).name}"] = digest_file(path)
            except OSError as error:
                raise InputError(
                    f"{path}: cannot be read for the report: {error.strerror}; it was there when training began"
                ) from None
    return digests


def _name_of(contest: Contest) -> str:
    """The baseline in the words of a sentence."""
    if contest.baseline_label:
        return contest.baseline_label
    if contest.baseline.name == contest.recipe.model.name:
        return "the model before training"
    stages = contest.recipe.stages
    for before in reversed(stages[:-1]):
        if contest.baseline.name.endswith(f"-{before.name}/final"):
            return f"the {before.name.upper() if before.name == before.method else before.name} model"
    return f"the model {Path(contest.baseline.name).name}"

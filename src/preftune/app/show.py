"""What there is: runs and one run, and the names that a recipe may use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.app.runs import RunFolder, list_runs
from preftune.core.files import read_json, read_jsonl


def list_kind(kind: str, output: Path) -> list[dict[str, Any]]:
    """Rows of ``preftune ls KIND``."""
    if kind == "runs":
        return [_run_row(run) for run in list_runs(output)]
    if kind == "recipes":
        from preftune.app.presets import list_presets

        return list(list_presets())
    from preftune.core.registry import Registry
    from preftune.data.formats.base import formats
    from preftune.data.sources.base import sources
    from preftune.judging.base import judges
    from preftune.maths.losses.base import losses

    tables: dict[str, Registry[Any]] = {"losses": losses, "formats": formats, "sources": sources, "judges": judges}
    table = tables[kind]
    return [{"name": name, "what": _first_line(table.factory(name).__doc__)} for name in table.names()]


@dataclass(frozen=True, slots=True)
class ShownRun:
    """One run as its folder tells it."""

    record: dict[str, Any]
    report: dict[str, Any] | None
    last_metrics: dict[str, dict[str, Any]]
    path: Path
    report_path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {"path": str(self.path), "run": self.record, "last_metrics": self.last_metrics, "report": self.report}

    def summary(self) -> list[str]:
        """What a person reads."""
        lines = [f"{self.record['id']}  {self.record['status']}  {self.record['created']}"]
        if self.record.get("error"):
            lines.append(f"error: {self.record['error']}")
        for stage in self.record["stages"]:
            metrics = self.last_metrics.get(stage["name"], {})
            words = ", ".join(
                f"{key} {value:.4g}" for key, value in metrics.items() if key in _SHOWN and isinstance(value, (int, float))
            )
            steps = stage.get("steps", metrics.get("step", "-"))
            lines.append(f"stage {stage['name']}  {stage['status']}  {steps} steps  {words}".rstrip())
        if self.report is not None:
            lines.append(str(self.report.get("sentence", "")))
            lines.append(f"report {self.report_path.with_suffix('.html') if self.report_path else ''}")
        if self.record.get("model"):
            lines.append(f"model {self.path / self.record['model']}")
        if self.record["status"] in ("failed", "interrupted") and any(self.path.glob("stages/*/checkpoints/*/manifest.json")):
            lines.append(f"its last checkpoint is whole; `preftune train --resume {self.path}` goes on from it")
        return lines


_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")


def show_run(given: str, output: Path) -> ShownRun:
    """A run by path or name.

    Raises
        UsageError: there is no such run; the message names the nearest.
    """
    run = RunFolder.open(given, output)
    record = run.read()
    last: dict[str, dict[str, Any]] = {}
    for index, stage in enumerate(record["stages"]):
        rows = read_jsonl(run.stage_folder(index, stage["name"]) / "metrics.jsonl")
        merged: dict[str, Any] = {}
        for row in rows:
            merged.update(row)
        last[stage["name"]] = merged
    newest = run.newest_report()
    return ShownRun(record, None if newest is None else read_json(newest), last, run.path, newest)


def _run_row(run: RunFolder) -> dict[str, Any]:
    record = run.read()
    newest = run.newest_report()
    verdict = None if newest is None else read_json(newest).get("verdict")
    return {
        "id": record["id"],
        "status": record["status"],
        "created": record["created"],
        "stages": "+".join(stage.get("name", "?") for stage in record["stages"]),
        "verdict": verdict,
        "path": str(run.path),
    }


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]

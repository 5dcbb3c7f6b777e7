"""Two models, or what was written before, compared as `preftune compare` does it, for a job: figures without a folder in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftune.core.files import replacing, write_json

ROWS, REPORT = "rows.jsonl", "report.json"


def run_contest(task: Mapping[str, Any], folder: Path) -> None:
    """Hold the contest of a task; ``folder`` gets the report and a line for every judged prompt.

    task: ``first`` and ``second``, each a folder of a model or a file of completions, with what they are ``called``; ``judge``, a
    mapping; ``path`` of the prompts, and ``settings`` of the evaluation.
    """
    from preftune.app.compare import compare

    overrides = [f"{key}={value}" for key, value in task["settings"].items()]
    result = compare(
        task["first"], task["second"], judge=task["judge"], prompts=task["path"], overrides=overrides, output=folder / "contest",
        labels=tuple(task["called"]),
    )  # fmt: skip
    with replacing(folder / ROWS) as file:
        file.write((result.report_json.parent / "completions.jsonl").read_bytes())
    write_json(folder / REPORT, {"verdict": result.verdict, "sentence": result.sentence, "win_rate": result.win_rate.to_dict()})

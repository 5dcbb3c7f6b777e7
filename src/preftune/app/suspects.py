"""``preftune show RUN --suspects``: the rows whose label goes most against what the other pairs teach."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.app.recipes import load_recipe
from preftune.app.runs import RunFolder
from preftune.core.errors import PreftuneError, UsageError
from preftune.core.records import Example, pair_of, text_of

if TYPE_CHECKING:
    from preftune.core.recipe import StageConfig
    from preftune.training.ledger import Look

EXCERPT = 90


@dataclass(frozen=True, slots=True)
class Suspect:
    """One row: where it is, what it says, and why it is listed."""

    file: str
    line: int
    deviation: float
    margins: tuple[float, ...]
    means: tuple[float, ...]
    steps: tuple[int, ...]
    prompt: str = ""
    chosen: str = ""
    rejected: str = ""
    note: str = ""

    @property
    def evidence(self) -> str:
        """The figures in a sentence."""
        looks = ", ".join(
            f"{margin:+.3f} at step {step} (mean {mean:+.3f})"
            for margin, mean, step in zip(self.margins, self.means, self.steps, strict=True)
        )
        return f"{self.deviation:+.2f} standard deviations from its step: margin {looks}"

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        return {
            "file": self.file,
            "line": self.line,
            "deviation": self.deviation,
            "margins": list(self.margins),
            "step_means": list(self.means),
            "steps": list(self.steps),
            "prompt": self.prompt,
            "chosen": self.chosen,
            "rejected": self.rejected,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Suspects:
    """The list of one stage, most suspect first."""

    run: str
    stage: str
    num_pairs: int
    rows: tuple[Suspect, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {"run": self.run, "stage": self.stage, "pairs": self.num_pairs, "suspects": [row.to_dict() for row in self.rows]}

    def summary(self) -> list[str]:
        """What a person reads."""
        first = (
            f"stage {self.stage}: {len(self.rows)} of {self.num_pairs} pairs whose margin, before they were trained on, was "
            "furthest below that of the pairs beside them; look at them, the list is no proof"
        )
        lines = [first]
        for row in self.rows:
            lines.append(f"{row.file}:{row.line}  {row.evidence}")
            lines += [f"  {name:8} {text}" for name, text in _texts(row) if text]
        return lines


def find_suspects(given: str, output: Path, top: int = 20) -> Suspects:
    """The suspects of a run's last stage over pairs.

    Raises
        UsageError: no such run, or none of its stages has trained on pairs.
    """
    from preftune.training.ledger import read_ledger

    run = RunFolder.open(given, output)
    recipe = load_recipe(run.recipe_path)
    stages = run.read()["stages"]
    for index in reversed(range(len(stages))):
        path = run.stage_folder(index, stages[index]["name"]) / "ledger.jsonl"
        looks = read_ledger(path) if path.is_file() else []
        if looks:
            config = next(stage for stage in recipe.stages if stage.name == stages[index]["name"])
            return Suspects(run.path.name, config.name, len(looks), _with_texts(looks[:top], config))
    raise UsageError(f"run {run.path.name} has no ledger: no stage has trained on pairs of chosen and rejected completions yet")


def _with_texts(looks: list[Look], config: StageConfig) -> tuple[Suspect, ...]:
    """The looks with the text of their rows, read again from the files that the stage was trained on."""
    from preftune.data.pipeline import read_examples

    wanted = {(look.file, look.line) for look in looks}
    examples: dict[tuple[str, int], Example] = {}
    notes: dict[str, str] = {}
    data_format = None if config.data is None else config.data.format
    for file in sorted({look.file for look in looks}):
        try:
            read = read_examples([file], format=data_format)
        except PreftuneError as error:
            notes[file] = f"cannot be shown: {error}"
            continue
        examples |= {(file, one.provenance.line): one for one in read.examples if (file, one.provenance.line) in wanted}
    return tuple(_suspect(look, examples.get((look.file, look.line)), notes.get(look.file, "")) for look in looks)


def _suspect(look: Look, example: Example | None, note: str) -> Suspect:
    pair = None if example is None else pair_of(example)
    facts = (look.file, look.line, look.deviation, look.margins, look.means, look.steps)
    if example is None or pair is None:
        return Suspect(*facts, note=note or "the row is no longer there")
    changed = "" if example.id.startswith(look.example_id) else "the row has changed since it was trained on"
    prompt, chosen, rejected = (_shorten(one) for one in (example.prompt_text, text_of(pair.chosen), text_of(pair.rejected)))
    return Suspect(*facts, prompt, chosen, rejected, changed)


def _texts(row: Suspect) -> list[tuple[str, str]]:
    return [("prompt", row.prompt), ("chosen", row.chosen), ("rejected", row.rejected), ("note", row.note)]


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT else f"{line[: EXCERPT - 3]}..."

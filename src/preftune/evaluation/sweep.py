"""A sweep: the same job at several settings, and how far each drifted from the reference for what it won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from preftune.core.files import write_json, write_text
from preftune.evaluation.figures import drift_chart
from preftune.evaluation.render import environment_of
from preftune.evaluation.report import without_nonfinite
from preftune.evaluation.winrate import WinRate, prompt_key
from preftune.statistics.intervals import Interval, mean_by_cluster, mean_interval

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One setting of a sweep.

    Parameters
        settings: the swept keys and their values. run: folder of the run, empty where it failed before it had one.
        status: ``done``, or ``failed`` with the error's sentence.
        rate, interval, joint: win rate over the baseline, its 95 % interval, and the interval at the level that holds for
            all points of the sweep together (Bonferroni: 1 - 0.05 / points).
        drift: estimated KL(policy || reference) in nats a completion, the probe's at the end; None where no probe ran.
        length_ratio: mean characters, policy / baseline.
        held_out: the last held-out metrics of training, which may choose a setting.
        reference_forwards: completions that the reference had to score for this point; 0 where all were cached.
        seconds: training and evaluation.
    """

    settings: Mapping[str, Any]
    run: str
    status: Literal["done", "failed"]
    error: str = ""
    rate: float | None = None
    interval: Interval | None = None
    joint: Interval | None = None
    verdict: str = ""
    drift: float | None = None
    length_ratio: float | None = None
    held_out: Mapping[str, float] = field(default_factory=dict)
    reference_forwards: int = 0
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """The settings in a few characters.

        >>> SweepPoint({"beta": 0.1, "stages.1.lr": 1e-4}, "", "done").label
        'beta 0.1, lr 0.0001'
        """
        return ", ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in self.settings.items())

    def to_dict(self) -> dict[str, Any]:
        """The point as JSON."""
        return asdict(self) | {"settings": dict(self.settings), "held_out": dict(self.held_out), "label": self.label}


@dataclass(frozen=True, slots=True)
class SweepReport:
    """All points of a sweep, in the order of the grid."""

    name: str
    created: str
    baseline: str
    judge: str
    num_prompts: int
    points: tuple[SweepPoint, ...]

    @property
    def done(self) -> list[SweepPoint]:
        """The points that have a win rate."""
        return [point for point in self.points if point.rate is not None]

    @property
    def best(self) -> SweepPoint | None:
        """The point of the highest win rate; of equal ones the one that drifted least."""
        return max(self.done, key=lambda one: (one.rate or 0.0, -(one.drift or 0.0)), default=None)

    @property
    def sentence(self) -> str:
        """The result in words, with what a choice among several points is worth."""
        best, count = self.best, len(self.done)
        if best is None or best.interval is None or best.joint is None or best.rate is None:
            return f"none of the {len(self.points)} points could be evaluated"
        drift = "" if best.drift is None else f" at a drift of {best.drift:.3g} nats a completion"
        equal = sum(one.rate == best.rate for one in self.done)
        among = f"best of {count}" if equal == 1 else f"{equal} of {count} points win equally often; {self._why_this_one}"
        text = (
            f"{among}: {best.label}, win rate {best.rate:.1%} [{best.interval.low:.1%}, {best.interval.high:.1%}] "
            f"over {self.baseline}{drift}"
        )
        if count > 1:
            text += (
                f"; chosen among {count} points, its interval is [{best.joint.low:.1%}, {best.joint.high:.1%}], and prompts "
                "that no point was chosen on are what proves it"
            )
        return text

    @property
    def _why_this_one(self) -> str:
        """What sets the point that is named apart from those of its win rate."""
        is_measured = any(one.drift is not None for one in self.done)
        return "the one that drifted least" if is_measured else "the first of them, as drift was not measured"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        best = self.best
        return {
            "name": self.name,
            "created": self.created,
            "baseline": self.baseline,
            "judge": self.judge,
            "num_prompts": self.num_prompts,
            "sentence": self.sentence,
            "best": None if best is None else best.label,
            "points": [point.to_dict() for point in self.points],
        }


@dataclass(frozen=True, slots=True)
class SweepFiles:
    """Where a sweep's report was written."""

    json: Path
    markdown: Path
    html: Path


def joint_interval(rate: WinRate, num_points: int, *, seed: int) -> Interval:
    """The interval of one point's rate at the level at which those of all points hold together (Bonferroni)."""
    keys = [prompt_key(one.prompt) for one in rate.judged]
    scores = mean_by_cluster([one.score for one in rate.judged], keys)
    return mean_interval(scores, level=1 - (1 - LEVEL) / num_points, seed=seed)


def write_sweep(report: SweepReport, folder: Path) -> SweepFiles:
    """Write ``sweep.json``, ``sweep.md`` and ``sweep.html``, each one atomically."""
    files = SweepFiles(folder / "sweep.json", folder / "sweep.md", folder / "sweep.html")
    write_json(files.json, without_nonfinite(report.to_dict()))
    facts = {"report": report, "keys": _keys(report.points)}
    write_text(files.markdown, environment_of(is_html=False).get_template("sweep.md.j2").render(**facts).strip() + "\n")
    css = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    chart = drift_chart([_mark(point) for point in report.done if point.drift is not None])
    page = environment_of(is_html=True).get_template("sweep.html.j2").render(**facts, css=css, chart=chart)
    write_text(files.html, page)
    return files


def _mark(point: SweepPoint) -> tuple[str, float, float, float, float]:
    assert point.interval is not None
    assert point.drift is not None
    assert point.rate is not None
    return point.label, point.drift, point.rate, point.interval.low, point.interval.high


def _keys(points: Sequence[SweepPoint]) -> list[str]:
    return list(dict.fromkeys(key for point in points for key in point.settings))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

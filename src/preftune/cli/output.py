"""What the verbs print: data to stdout, talk to stderr, progress bars only where somebody watches."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from preftune.core.errors import Blocked, PreftuneError
from preftune.core.events import CheckpointSaved, EvalDone, Event, Noted, Progress, StageFinished, StageStarted, StepDone

UPDATE_SECONDS = 5.0


def print_json(value: Any) -> None:
    """One JSON value on stdout; what is not a number in JSON becomes null."""
    sys.stdout.write(json.dumps(clean(value), ensure_ascii=False, indent=2) + "\n")


class Result(Protocol):
    """What a verb's function gives back: the same facts as data and as lines for a person."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""

    def summary(self) -> list[str]:
        """As lines."""


def print_result(result: Result, *, is_json: bool) -> None:
    """A result on stdout, as the user asked for it."""
    if is_json:
        print_json(result.to_dict())
        return
    for line in result.summary():
        sys.stdout.write(line + "\n")


def clean(value: Any) -> Any:
    """The value with NaN and infinities as None, mappings and sequences as plain ones."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(one) for one in value]
    return value


def say(text: str) -> None:
    """A sentence for the person at the terminal."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def print_error(error: PreftuneError, code: int, *, is_json: bool) -> int:
    """One line (one for each blocker), and with --json the same as data; returns the exit code."""
    findings = error.findings if isinstance(error, Blocked) else []
    if is_json:
        facts: dict[str, Any] = {"type": type(error).__name__, "message": str(error), "exit_code": code}
        if findings:
            facts["findings"] = [
                {"level": one.level, "code": one.code, "fact": one.fact, "way_out": one.way_out} for one in findings
            ]
        print_json({"error": facts})
    lines = [str(one) for one in findings] or [f"error: {' '.join(str(error).split())}"]
    for line in lines:
        say(line)
    return code


class ProgressPrinter:
    """Shows events to a person: a live bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._is_live = sys.stderr.isatty()
        self._num_steps: dict[str, int] = {}
        self._bar: Any = None
        self._task: Any = None
        self._label = ""
        self._next_line = 0.0

    def __call__(self, event: Event, /) -> None:
        """Show one event."""
        match event:
            case StageStarted():
                self._num_steps[event.stage] = event.num_steps
                facts = ", ".join(f"{key} {value}" for key, value in event.facts.items())
                self._line(f"[{event.stage}] {event.num_steps} steps{'; ' + facts if facts else ''}")
            case Progress():
                self._advance(event.what, event.done, event.total, "")
            case StepDone():
                total = self._num_steps.get(event.stage, event.step)
                self._advance(event.stage, event.step, total, step_text(event.metrics, total - event.step, event.step))
            case EvalDone():
                self._line(f"[{event.stage}] step {event.step}: {eval_text(event.metrics)}")
            case CheckpointSaved():
                pass
            case StageFinished():
                self._close()
                say(f"[{event.stage}] done after {event.step} steps: {event.model}")
            case Noted():
                self._line(f"{event.level}: {event.message}")

    def _advance(self, label: str, done: int, total: int, text: str) -> None:
        if self._is_live:
            self._advance_bar(label, done, total, text)
            return
        now = time.monotonic()
        if label != self._label or done >= total or now >= self._next_line:
            self._label, self._next_line = label, now + UPDATE_SECONDS
            count = f"{done}/{total}" if total else f"{done}"  # how many there will be is not always known
            say(f"[{label}] {count} {text}".rstrip())

    def _advance_bar(self, label: str, done: int, total: int, text: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        if self._bar is None or label != self._label:
            self._close()
            self._label = label
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"), console=Console(stderr=True), transient=False,
            )  # fmt: skip
            self._task = self._bar.add_task(label, total=total or None, text="")
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total or None, text=text)
        if done >= total:
            self._close()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            say(text)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._label = ""


def step_text(metrics: Mapping[str, float], left: int, done: int) -> str:
    """A step in a few words: loss, accuracy, margin, speed, memory, and how long the steps that are left will take.

    >>> step_text({"loss": 0.5, "elapsed_s": 60.0}, left=30, done=10)
    'loss 0.5000 | 3 min left'
    >>> step_text({"loss": 0.7334, "aux_loss": 2.01}, left=0, done=1)
    'loss 0.7334, of experts 2.01 unweighted'
    """
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    if "aux_loss" in metrics:  # a weighted part of the loss, which is above log 2 at the start then
        parts[-1:] = [f"{parts[-1]}, of experts {metrics['aux_loss']:.2f} unweighted"] if parts else []
    if "rewards/accuracies" in metrics:
        parts.append(f"accuracy {metrics['rewards/accuracies']:.2f} margin {metrics['rewards/margins']:+.3f}")
    if "pairs_per_second" in metrics:
        parts.append(f"{metrics['pairs_per_second']:.1f} pairs/s {metrics.get('tokens_per_second', 0):,.0f} tokens/s")
    if "peak_memory_gb" in metrics:
        parts.append(f"{metrics['peak_memory_gb']:.2f} GB")
    if "elapsed_s" in metrics and left > 0:
        seconds = metrics["elapsed_s"] / done * left
        parts.append(f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left")
    return " | ".join(parts)


def eval_text(metrics: Mapping[str, float]) -> str:
    """Held-out metrics, or those of the probe, in a few words.

    >>> eval_text({"eval_loss": 0.5}), eval_text({"kl": 1.25, "probe/entropy": 2.0, "probe/length_ratio": 1.1})
    ('held out loss 0.5000', 'probe kl 1.2500, entropy 2.0000, length ratio 1.1000')
    """
    held_out = [("eval_loss", "loss"), ("eval_rewards/accuracies", "accuracy"), ("eval_rewards/margins", "margin")]
    probe = [("kl", "kl"), ("probe/kl", "kl"), ("probe/entropy", "entropy"), ("probe/length_ratio", "length ratio")]
    title, shown = ("probe", probe) if "probe/entropy" in metrics else ("held out", held_out)
    return f"{title} " + ", ".join(f"{word} {metrics[key]:.4f}" for key, word in shown if key in metrics)

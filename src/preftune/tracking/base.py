"""What a sink is: a frozen dataclass of options that begins a run, takes its events and ends it.

A sink lives on a thread of its own (:mod:`preftune.tracking.runner`), so it may be slow, raise or hang. Metrics go by the names
that Hugging Face's trainers use: ``train/loss``, ``eval/rewards/margins``; with several stages ``STAGE/train/loss``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from preftune.core.events import EvalDone, Event, StepDone
from preftune.core.registry import Registry

Status = Literal["finished", "interrupted", "failed"]
SECRET_ENDS = ("api_key", "password", "secret", "access_token", "auth_token")
SECRET_VARIABLES = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "OPENAI_API_KEY")
HIDDEN = "***"


@dataclass(frozen=True, slots=True)
class DataFacts:
    """One set of examples of a stage: its files, how many rows were used, and a digest of them in their order."""

    stage: str
    split: Literal["train", "select"]
    files: tuple[str, ...]
    rows: int
    digest: str


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a sink is told before the first event.

    Parameters
        name: of the run, unique, the same when it is resumed. folder: of the run. recipe: resolved, as JSON, secrets hidden.
        stages: their names. data: what they train on, as far as it is there.
    """

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    stages: tuple[str, ...]
    data: tuple[DataFacts, ...] = field(default=())

    def key(self, stage: str, metric: str) -> str:
        """A metric under the name that a sink shows.

        >>> facts = RunFacts("r", Path(), {}, ("dpo",))
        >>> facts.key("dpo", "loss"), facts.key("dpo", "eval_loss"), facts.key("dpo", "probe/entropy")
        ('train/loss', 'eval/loss', 'probe/entropy')
        >>> RunFacts("r", Path(), {}, ("sft", "dpo")).key("dpo", "rewards/margins")
        'dpo/train/rewards/margins'
        """
        if metric.startswith("eval_"):
            named = f"eval/{metric.removeprefix('eval_')}"
        elif metric.startswith("probe/"):
            named = metric
        else:
            named = f"train/{metric}"
        return named if len(self.stages) < 2 else f"{stage}/{named}"

    def metrics(self, event: StepDone | EvalDone) -> dict[str, float]:
        """The metrics of an event under those names."""
        return {self.key(event.stage, name): float(value) for name, value in event.metrics.items()}


class Sink(Protocol):
    """One tool. Every method is called on one thread, in order; what they raise is told once and ends the sink.

    A sink may also have ``abandon()``. It is called on the run's thread when the run ends and the sink failed or still works, and
    ends at once whatever of the tool would keep the process from ending.
    """

    def missing(self) -> str:
        """What keeps the sink from working, in a few words, such as a package that is not installed; else empty."""

    def way_out(self) -> str:
        """What to do about ``missing``."""

    def begin(self, run: RunFacts) -> None:
        """Open the tool's own run, or go on with the one of that name."""

    def take(self, event: Event) -> None:
        """One event of the run."""

    def end(self, status: Status) -> None:
        """Close it; everything is written when this returns."""


sinks: Registry[Sink] = Registry("sink", "preftune.tracking", "preftune.sinks")


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested mapping by dotted keys; empty parts and None are left out.

    >>> dict(flat({"a": {"b": 1, "c": None}, "s": [{"lr": 2}, {"lr": 3}]}))
    {'a.b': 1, 's.0.lr': 2, 's.1.lr': 3}
    """
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from flat(one, f"{prefix}{key}.")
    elif isinstance(value, (list, tuple)) and any(isinstance(one, (Mapping, list, tuple)) for one in value):
        for index, one in enumerate(value):
            yield from flat(one, f"{prefix}{index}.")
    elif value is not None and value not in ((), [], ""):
        yield prefix.removesuffix("."), value


def hide_secrets(value: Any) -> Any:
    """A copy of JSON values in which what is called a key or password is hidden.

    >>> hide_secrets({"judge": {"api_key": "abc", "model": "m"}, "tokens_per_pack": 8})
    {'judge': {'api_key': '***', 'model': 'm'}, 'tokens_per_pack': 8}
    """
    if isinstance(value, Mapping):
        return {
            str(key): HIDDEN if one and str(key).lower().endswith(SECRET_ENDS) else hide_secrets(one)
            for key, one in value.items()
        }
    return [hide_secrets(one) for one in value] if isinstance(value, (list, tuple)) else value


def without_secrets(text: str) -> str:
    """A message of somebody else's code in which the values of the environment's secrets are hidden."""
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name)
        if secret and len(secret) >= 6:
            text = text.replace(secret, HIDDEN)
    return text

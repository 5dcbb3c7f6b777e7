"""What a workflow says while it runs. Training emits these to a sink; whoever listens decides what to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage begins: its name, the optimiser steps it will take and the facts worth showing."""

    stage: str
    num_steps: int
    facts: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Progress:
    """Work outside the loop that takes time: scoring the reference, generating, judging."""

    what: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimiser step with its metrics (TRL's names) and its speed."""

    stage: str
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class EvalDone:
    """Metrics after a step that are not its own: held-out ones (prefix ``eval_``), or those of the probe (``kl``, ``probe/``)."""

    stage: str
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint is on the disk, whole."""

    stage: str
    step: int
    path: str


@dataclass(frozen=True, slots=True)
class StageFinished:
    """A stage ended; ``model`` is the folder of its final weights."""

    stage: str
    step: int
    model: str


@dataclass(frozen=True, slots=True)
class Noted:
    """A sentence for the user: an alert, a fallback taken, a count."""

    level: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Stop:
    """No event: what a callback returns to end the stage after the step at hand."""

    reason: str


Event: TypeAlias = StageStarted | Progress | StepDone | EvalDone | CheckpointSaved | StageFinished | Noted


class EventSink(Protocol):
    """Takes events; must not raise."""

    def __call__(self, event: Event, /) -> None:
        """Take one event."""


def ignore(event: Event, /) -> None:
    """The sink that keeps nothing."""
    del event

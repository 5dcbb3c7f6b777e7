"""trackio: local dashboards on SQLite, with alerts."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from preftune.core.events import EvalDone, Event, Noted, StepDone
from preftune.tracking.base import RunFacts, Status, sinks


@sinks.register("trackio")
@dataclass(slots=True)
class Trackio:
    """One trackio run a preftune run, in ``TRACKIO_DIR`` or trackio's default; `trackio show` shows it.

    Parameters
        project: created where it does not exist. space: a Hugging Face Space to log to instead of this machine.
    """

    project: str = "preftune"
    space: str = ""
    _run: RunFacts | None = field(default=None, init=False, repr=False)
    _trackio: Any = field(default=None, init=False, repr=False)

    def missing(self) -> str:
        """The package."""
        return "" if find_spec("trackio") else "the package trackio is not installed"

    def way_out(self) -> str:
        """Its extra."""
        return "pip install 'preftune[trackio]', or drop it from tracking"

    def begin(self, run: RunFacts) -> None:
        """Open or go on with the run of that name."""
        import trackio

        self._run, self._trackio = run, trackio
        with contextlib.redirect_stdout(sys.stderr):  # it greets on stdout, which is for data
            trackio.init(
                project=self.project,
                name=run.name,
                config=dict(run.recipe),
                space_id=self.space or None,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def take(self, event: Event) -> None:
        """Metrics, and warnings as alerts."""
        assert self._run is not None
        if isinstance(event, StepDone | EvalDone):
            self._trackio.log(self._run.metrics(event), step=event.step)
        elif isinstance(event, Noted) and event.level == "warning":
            with contextlib.redirect_stdout(sys.stderr):
                self._trackio.alert(event.code, event.message, level=self._trackio.AlertLevel.WARN)

    def end(self, status: Status) -> None:
        """Finish it; one that was interrupted or failed says so."""
        with contextlib.redirect_stdout(sys.stderr):
            if status != "finished":
                self._trackio.alert(f"run {status}", level=self._trackio.AlertLevel.ERROR)
            self._trackio.finish()

"""Weights & Biases, online or offline."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from preftune.core.events import EvalDone, Event, Noted, StepDone
from preftune.tracking.base import RunFacts, Status, sinks

HOST = "api.wandb.ai"


@sinks.register("wandb")
@dataclass(slots=True)
class WeightsAndBiases:
    """One W&B run a preftune run, with a step axis for each stage; a resumed run goes on with its own.

    Its files are in ``RUN/tracking/wandb``; ``wandb sync`` uploads those of an offline run. The key comes from `wandb login`
    or ``WANDB_API_KEY``, never from a recipe.

    Parameters
        project, entity: where; the entity's default where it is empty. mode: ``WANDB_MODE`` where it is empty, else online.
    """

    project: str = "preftune"
    entity: str = ""
    mode: Literal["", "online", "offline", "disabled"] = ""
    _run: RunFacts | None = field(default=None, init=False, repr=False)
    _wandb: Any = field(default=None, init=False, repr=False)

    def missing(self) -> str:
        """The package; a key, where the run is to be uploaded."""
        if not find_spec("wandb"):
            return "the package wandb is not installed"
        if self._mode() == "online" and not _has_key():
            return "there is no W&B key on this machine, and it would be asked for in the middle of the run"
        return ""

    def way_out(self) -> str:
        """Its extra, or how to give the key."""
        if not find_spec("wandb"):
            return "pip install 'preftune[wandb]', or drop it from tracking"
        return "run `wandb login`, set WANDB_API_KEY, or write tracking: [{wandb: {mode: offline}}]"

    def begin(self, run: RunFacts) -> None:
        """Open or go on with the run of that name."""
        import wandb

        folder = run.folder / "tracking"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._wandb = wandb.init(
            project=self.project,
            entity=self.entity or None,
            name=run.name,
            id=run.name,
            resume="allow",
            config=dict(run.recipe),
            dir=str(folder),
            mode=self._mode(),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        for stage in run.stages:
            prefix = "" if len(run.stages) < 2 else f"{stage}/"
            self._wandb.define_metric(f"{prefix}step")
            self._wandb.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
        self._wandb.config.update({"data": [f"{one.stage} {one.split} {one.rows} {one.digest}" for one in run.data]})

    def take(self, event: Event) -> None:
        """Metrics, and warnings in the summary."""
        assert self._run is not None
        if isinstance(event, StepDone | EvalDone):
            prefix = "" if len(self._run.stages) < 2 else f"{event.stage}/"
            self._wandb.log({**self._run.metrics(event), f"{prefix}step": event.step})
        elif isinstance(event, Noted) and event.level == "warning":
            self._wandb.summary[f"alert/{event.code}"] = event.message

    def end(self, status: Status) -> None:
        """Finish it; an interrupted or failed run is marked."""
        self._wandb.summary["status"] = status
        self._wandb.finish(exit_code=0 if status == "finished" else 1)

    def _mode(self) -> str:
        return self.mode or os.environ.get("WANDB_MODE", "") or "online"


def _has_key() -> bool:
    """Whether `wandb login` or the environment gave a key; it is not looked at."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", f"https://{HOST}").split("://")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

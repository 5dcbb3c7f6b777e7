"""Weights & Biases, online or offline."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from preftune.core.addresses import AddressPolicy
from preftune.core.events import EvalDone, Event, Noted, StepDone
from preftune.tracking.base import RunFacts, Status, sinks
from preftune.tracking.guarded_proxy import GuardedProxy

HOST = "api.wandb.ai"
CLOUD = f"{HOST}, storage.googleapis.com"  # the second is where W&B's own service has files put
INIT_SECONDS = 60.0
"""How long a W&B server may take to begin a run; its thread waits, the run does not."""
FINISH_SECONDS = 20.0
"""How long it may take for the last metrics: less than the runner lets a sink end in, so that W&B itself says what is missing."""
SERVICE = "wandb-core"
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s'\"/]+/)+")


def wandb_policy() -> AddressPolicy | None:
    """What a W&B run may reach in a process that works on users' words: W&B's own service, and what the operator allows.

    None where PREFTUNE_ALLOW_URLS is not set: a person's own process reaches what that person says.
    """
    policy = AddressPolicy.of_process()
    return None if policy is None else AddressPolicy((*policy.entries, *AddressPolicy.of(CLOUD).entries))


@sinks.register("wandb")
@dataclass(slots=True)
class WeightsAndBiases:
    """One W&B run a preftune run, with a step axis for each stage; a resumed run goes on with its own.

    Its files are in ``RUN/tracking/wandb``; ``wandb sync`` uploads those of an offline run. The key comes from `wandb login`
    or ``WANDB_API_KEY``, never from a recipe.

    In a server's job (PREFTUNE_ALLOW_URLS is set) the package reaches only what ``wandb_policy`` allows, and what it tells of
    itself names neither this machine nor its folders.

    Parameters
        project, entity: where; the entity's default where it is empty. mode: ``WANDB_MODE`` where it is empty, else online.
        id, name: of the W&B run, and the name that is shown; the run's own where they are empty. tags: of the W&B run.
    """

    project: str = "preftune"
    entity: str = ""
    mode: Literal["", "online", "offline", "disabled"] = ""
    id: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    _is_guarded: bool = field(default=False, init=False, repr=False)
    _is_service_ours: bool = field(default=False, init=False, repr=False)
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
        guarded = self._guard()
        self._is_guarded, self._is_service_ours = bool(guarded), not _services()
        patience: dict[str, Any] = {"init_timeout": INIT_SECONDS}
        if "finish_timeout" in wandb.Settings.model_fields:  # older packages wait until `abandon` ends them
            patience |= {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        self._wandb = wandb.init(
            project=self.project,
            entity=self.entity or None,
            name=self.name or self.id or run.name,
            id=self.id or run.name,
            tags=list(self.tags) or None,
            resume="allow",
            config=without_folders(dict(run.recipe)) if guarded else dict(run.recipe),
            dir=str(folder),
            mode=self._mode(),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, **patience, **guarded),
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
            said = without_folders(event.message) if self._is_guarded else event.message
            self._wandb.summary[f"alert/{event.code}"] = said

    def end(self, status: Status) -> None:
        """Finish it; an interrupted or failed run is marked."""
        self._wandb.summary["status"] = status
        self._wandb.finish(exit_code=0 if status == "finished" else 1)

    def abandon(self) -> None:
        """End the package's service, which sends: else the package waits for it when this process ends, for minutes where nobody
        answers. What it did not send is in ``RUN/tracking/wandb``. A service that somebody else began stays."""
        for process in _services() if self._is_service_ours else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _guard(self) -> dict[str, Any]:
        """Settings of a run on a user's word: through a proxy that judges addresses, and silent on this machine."""
        policy = wandb_policy()
        if policy is None:
            return {}
        proxy = GuardedProxy(policy).url  # it lives as long as the process: W&B's service sends its last words at exit
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            os.environ.update({name: proxy, name.lower(): proxy})
        os.environ.update({"NO_PROXY": "", "no_proxy": "", "WANDB_ERROR_REPORTING": "false"})
        return {
            "http_proxy": proxy, "https_proxy": proxy, "host": "preftune", "x_disable_machine_info": True, "x_disable_meta": True,
            "x_disable_stats": True, "x_save_requirements": False,
        }  # fmt: skip

    def _mode(self) -> str:
        return self.mode or os.environ.get("WANDB_MODE", "") or "online"


def _services() -> list[int]:
    """Processes of W&B's service that this one started; none where the system does not tell (it has no /proc)."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text(encoding="utf-8", errors="replace").rpartition(")")  # PID (NAME) STATE PARENT ...
            if name.endswith(f"({SERVICE}") and int(rest.split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


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


def without_folders(value: Any) -> Any:
    """The same JSON in which a place of this machine is its last name alone.

    >>> without_folders({"data": ["/srv/state/files/file-1.jsonl:3"], "what": "first /a/b/c; then 1/2"})
    {'data': ['file-1.jsonl:3'], 'what': 'first c; then 1/2'}
    """
    if isinstance(value, Mapping):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(one) for one in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value

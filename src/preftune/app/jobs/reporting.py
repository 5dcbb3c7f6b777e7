"""Jobs that report to Weights & Biases on a user's word: the recipe's sink, the key in the vault, the child's environment.

The key and the address are no part of a job: they are kept encrypted under the job's id and reach its training process by the
environment alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from preftune.app.jobs import vault
from preftune.app.jobs.platform import Platform, event
from preftune.core.addresses import AddressRefused
from preftune.core.errors import UsageError
from preftune.store.base import Query
from preftune.store.records import Job, Secret
from preftune.tracking.base import sinks
from preftune.tracking.wandb import HOST, wandb_policy

SINK = "wandb"
PROJECT = "preftune"
MAX_TAGS = 64
_KEY = re.compile(r"[\x21-\x7e]{1,512}")
_PROJECT = re.compile(r"[^/\\#?%:\x00-\x1f\x7f]{1,128}")
_WORDS = re.compile(r"[^\x00-\x1f\x7f]{1,128}")


@dataclass(frozen=True, slots=True)
class Report:
    """Where a job is to report to.

    Parameters
        project, entity, name, tags: of the W&B run. key: the user's; empty means the operator's own, if there is one.
        base_url: of the W&B server; empty means the operator's, else api.wandb.ai.
    """

    project: str = PROJECT
    entity: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    key: str = field(default="", repr=False)
    base_url: str = ""

    def check(self) -> None:
        """Refuse what W&B or this server does not allow; a message never holds the key.

        Raises
            UsageError: a word that W&B does not take, or a URL that is none.
            AddressRefused: a URL of a host that the operator does not allow.
        """
        if self.key and not _KEY.fullmatch(self.key):
            raise UsageError("the W&B key holds blanks or control characters, or is longer than 512; send it as W&B shows it")
        if not _PROJECT.fullmatch(self.project):
            raise UsageError(r"the W&B project needs 1 to 128 characters without / \ # ? % :")
        for what, word in (("entity", self.entity), ("name", self.name), *(("tag", one) for one in self.tags)):
            if (word or what == "tag") and not _WORDS.fullmatch(word):
                raise UsageError(f"the W&B {what} needs 1 to 128 characters and no control characters")
        if len(self.tags) > MAX_TAGS or len(set(self.tags)) != len(self.tags):
            raise UsageError(f"W&B takes up to {MAX_TAGS} tags, each once")
        if self.base_url:
            if not self.key:
                raise UsageError("a W&B base URL needs the key that belongs to it: the server's own key goes nowhere else")
            _check_url(self.base_url)

    def sink(self, job_id: str) -> dict[str, Any]:
        """The entry of the recipe's ``tracking``: without it the run goes on where the package is not there."""
        options = {"project": self.project, "id": job_id, "entity": self.entity, "name": self.name, "tags": list(self.tags)}
        return {"name": SINK, "options": {key: value for key, value in options.items() if value}, "required": False}


def attach(platform: Platform, job: Job, report: Report) -> tuple[Job, list[str]]:
    """The job with its sink, its key kept; and what its user should know: that nothing can be reported here, and why.

    Raises
        UsageError: what ``Report.check`` refuses.
    """
    report.check()
    if report.key:
        value = json.dumps({"key": report.key, "base_url": report.base_url})
        vault.keep(platform, job.project, _name(job.id), value)
    entry = report.sink(job.id)
    made = job.model_copy(update={"recipe": {**job.recipe, "tracking": [entry]}})
    lacking = sinks.build(SINK, entry["options"])
    why = lacking.missing()
    if report.key and not why.startswith("the package"):
        return made, []
    if not why:
        return made, []
    if why.startswith("the package"):
        why = f"{why} on this server (its operator adds it: {lacking.way_out().partition(',')[0]})"
    else:
        why = "no W&B key was sent, and the server has none of its own"
    return made, [f"Weights & Biases is not reported to: {why}; metrics are events of the job"]


def environment_of(platform: Platform, job: Job) -> dict[str, str]:
    """The user's key and address, for the environment of the training process: nowhere else are they in the clear."""
    secret = _secret(platform, job)
    if secret is None:
        return {}  # the operator's own key, if there is one
    try:
        kept: Mapping[str, str] = json.loads(vault.read(platform, secret.id, job.project))
    except vault.SecretUnreadable as error:
        said = event(job.id, job.project, "tracking_unavailable", f"Weights & Biases is not reported to: {error}", level="warn")
        platform.store.insert(said)
        return {"WANDB_API_KEY": "", "WANDB_MODE": "disabled"}
    return {"WANDB_API_KEY": kept["key"]} | ({"WANDB_BASE_URL": kept["base_url"]} if kept["base_url"] else {})


def forget(platform: Platform, job: Job) -> None:
    """Let go of the key of a job that will not run again."""
    if _secret(platform, job) is not None:
        vault.forget(platform, job.project, _name(job.id))


def _secret(platform: Platform, job: Job) -> Secret | None:
    """The kept key of a job that reports; None where it came without one."""
    if not any(one.get("name") == SINK for one in job.recipe.get("tracking") or ()):
        return None
    found = platform.store.page(Secret, Query(job.project, {"name": _name(job.id)}, limit=1)).items
    return found[0] if found else None


def _name(job_id: str) -> str:
    return f"{SINK} {job_id}"


def _check_url(url: str) -> None:
    """A plain http or https URL of a host that may be reached; it is judged again whenever the run connects."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        parts, port = urlsplit(""), 0
    is_plain = url.isascii() and url.isprintable() and " " not in url and len(url) <= 2000
    if not is_plain or parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
        raise UsageError(f"the W&B base URL: write https://HOST or http://HOST:PORT, such as https://{HOST}, without a user name")
    if parts.query or parts.fragment:
        raise UsageError("the W&B base URL takes no query and no fragment")
    policy = wandb_policy()
    if policy is None:
        return
    try:
        policy.places(parts.hostname, port)
    except AddressRefused:
        raise
    except OSError as error:
        raise UsageError(f"the W&B base URL: {parts.hostname} has no address ({error.strerror or error})") from None

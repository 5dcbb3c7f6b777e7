"""The nouns of both clients, each request described once (``methods`` makes the methods of them)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preftune.core import api, served
from preftune.core.api_evaluations import Rows
from preftune.sdk import calls
from preftune.sdk.calls import Call, at
from preftune.sdk.methods import asks, lists


class Files:
    """Uploaded files."""

    @lists
    def list(
        self, *, purpose: str | None = None, status: api.FileStatus | None = None, sha256: str | None = None, limit: int = 100
    ) -> Call[api.Page[api.File]]:
        """Files, newest first. limit: how many are fetched at once."""
        return calls.page(at("files"), api.File, purpose=purpose, status=status, sha256=sha256, limit=limit)

    @asks
    def get(self, file_id: str) -> Call[api.File]:
        """One file."""
        return calls.get(at("files", file_id), api.File)

    @asks
    def report(self, file_id: str) -> Call[api.FileReport]:
        """What validation found."""
        return calls.get(at("files", file_id, "report"), api.FileReport)

    @asks
    def delete(self, file_id: str) -> Call[api.Deleted]:
        """Delete a file."""
        return calls.delete(at("files", file_id), api.Deleted)


class Jobs:
    """Jobs: training of any method, and evaluations."""

    @asks
    def create(
        self, /, recipe: Mapping[str, Any] | None = None, *, model: str | None = None, files: str | Sequence[str] | None = None,
        idempotency_key: str | None = None, **fields: Any,
    ) -> Call[api.JobDetail]:  # fmt: skip
        """Create a training job: a recipe with ids of files in the place of paths, or simple fields.

        Parameters
            fields: ``method``, ``validation``, ``from_checkpoint``, ``seed``, ``suffix``, ``metadata``, ``priority``, ``loss``,
                ``no_probe`` (``True``: nobody asks whether the model can do the task); any other is a key of the recipe's stage
                or an option of the loss (``beta=0.1, epochs=2, adapter="full"``).
            idempotency_key: the same key makes no second job; a fresh one is sent by default, so a retry makes none either.
        """
        return calls.create_job(calls.job_fields(recipe, model, files, fields), idempotency_key)

    @lists
    def list(
        self, *, status: str | Sequence[str] | None = None, work: str | None = None, name: str | None = None,
        dialect: str | None = None, metadata: Mapping[str, str] | None = None, limit: int = 100,
    ) -> Call[api.Page[api.Job]]:  # fmt: skip
        """Jobs, newest first, whichever client made them. limit: how many are fetched at once."""
        given: dict[str, Any] = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        given |= {"status": status, "work": work, "name": name, "dialect": dialect, "limit": limit}
        return calls.page(at("jobs"), api.Job, **given)

    @asks
    def get(self, job_id: str) -> Call[api.JobDetail]:
        """One job."""
        return calls.get(at("jobs", job_id), api.JobDetail)

    @asks
    def cancel(self, job_id: str) -> Call[api.JobDetail]:
        """Cancel a job; a running one checkpoints first."""
        return calls.post(at("jobs", job_id, "cancel"), api.JobDetail)

    @asks
    def pause(self, job_id: str) -> Call[api.JobDetail]:
        """Pause a job; a running one checkpoints first."""
        return calls.post(at("jobs", job_id, "pause"), api.JobDetail)

    @asks
    def resume(self, job_id: str) -> Call[api.JobDetail]:
        """Let a paused job go on."""
        return calls.post(at("jobs", job_id, "resume"), api.JobDetail)

    @asks
    def retry(self, job_id: str, reason: str, *, no_probe: bool = False) -> Call[api.JobDetail]:
        """Queue a failed or cancelled job again. no_probe: as in ``create``, from here on."""
        asked = {"reason": reason} | ({"no_probe": True} if no_probe else {})
        return calls.post(at("jobs", job_id, "retry"), api.JobDetail, asked)

    @asks
    def set_priority(self, job_id: str, priority: int) -> Call[api.JobDetail]:
        """Let a waiting job go before others, or behind them."""
        return calls.post(at("jobs", job_id, "priority"), api.JobDetail, {"priority": priority})

    @asks
    def delete(self, job_id: str) -> Call[api.Deleted]:
        """Take an ended job out of every list."""
        return calls.delete(at("jobs", job_id), api.Deleted)

    @lists
    def metrics(self, job_id: str, *, limit: int = 1000) -> Call[api.Page[api.Metrics]]:
        """Numbers of steps, of held-out evaluations and of the probe, oldest first."""
        return calls.page(at("jobs", job_id, "metrics"), api.Metrics, order="asc", limit=limit)


class Models:
    """Models that jobs made, and the base models that they start from."""

    @lists
    def list(
        self, *, form: str | None = None, job: str | None = None, name: str | None = None, limit: int = 100
    ) -> Call[api.Page[api.Model]]:
        """Models that were made in the project, newest first."""
        return calls.page(at("models"), api.Model, form=form, job=job, name=name, limit=limit)

    @lists
    def base(self) -> Call[api.Page[api.Model]]:
        """Models that jobs may start from."""
        return calls.page(at("models", "base"), api.Model)

    @asks
    def get(self, name: str) -> Call[api.Model]:
        """The newest version of a name, or the version of an id."""
        return calls.get(at("models", name), api.Model)

    @lists
    def versions(self, name: str) -> Call[api.Page[api.Model]]:
        """Every version of a name."""
        return calls.page(at("models", name, "versions"), api.Model)

    @asks
    def lineage(self, name: str) -> Call[api.Lineage]:
        """Where a model comes from."""
        return calls.get(at("models", name, "lineage"), api.Lineage)

    @asks
    def delete(self, name: str) -> Call[api.Deleted]:
        """Delete a version."""
        return calls.delete(at("models", name), api.Deleted)


class Aliases:
    """Movable names of models."""

    @lists
    def list(self) -> Call[api.Page[api.Alias]]:
        """Aliases of the project."""
        return calls.page(at("aliases"), api.Alias)

    @asks
    def get(self, name: str) -> Call[api.Alias]:
        """Where an alias points."""
        return calls.get(at("aliases", name), api.Alias)

    @asks
    def set(self, name: str, model: str, *, reason: str = "") -> Call[api.Alias]:
        """Point an alias to a model."""
        return calls.put(at("aliases", name), api.Alias, {"model": model, "reason": reason})

    @asks
    def delete(self, name: str) -> Call[api.Deleted]:
        """Let an alias point nowhere."""
        return calls.delete(at("aliases", name), api.Deleted)

    @lists
    def history(self, name: str) -> Call[api.Page[api.Event]]:
        """Where an alias pointed, newest first."""
        return calls.page(at("aliases", name, "history"), api.Event)


class Evaluations:
    """Answers judged by a model, as jobs: ``jobs.wait`` waits for one, its ``result`` has the numbers, ``rows`` what was judged.

    A side is the name of a column of the file that holds answers, or a model that is asked to write them.
    """

    @asks
    def compare(
        self, file_id: str, first: str | served.AskedModel, second: str | served.AskedModel, *,
        judge: str | served.AskedModel, both_orders: bool = True,
    ) -> Call[served.EvaluationMade]:  # fmt: skip
        """Which of two sides the judge prefers. both_orders: ask again with places changed; a contradiction is a tie."""
        given = {"model_a": calls.side(first), "model_b": calls.side(second), "disable_position_bias_correction": not both_orders}
        return calls.evaluation("compare", file_id, judge, given)

    @asks
    def score(
        self, file_id: str, model: str | served.AskedModel, *, judge: str | served.AskedModel, low: float, high: float,
        passes_from: float,
    ) -> Call[served.EvaluationMade]:  # fmt: skip
        """A number from ``low`` to ``high`` for each answer; those from ``passes_from`` on pass."""
        given = {"model_to_evaluate": calls.side(model), "min_score": low, "max_score": high, "pass_threshold": passes_from}
        return calls.evaluation("score", file_id, judge, given)

    @asks
    def classify(
        self, file_id: str, model: str | served.AskedModel, *, judge: str | served.AskedModel, labels: Sequence[str],
        passing: Sequence[str],
    ) -> Call[served.EvaluationMade]:  # fmt: skip
        """One of the labels for each answer; those among ``passing`` pass."""
        given = {"model_to_evaluate": calls.side(model), "labels": [*labels], "pass_labels": [*passing]}
        return calls.evaluation("classify", file_id, judge, given)

    @asks
    def contest(
        self, /, first: str | Mapping[str, str], second: str | Mapping[str, str], *, judge: str | Mapping[str, Any],
        prompts: str | None = None, **settings: Any,
    ) -> Call[api.JobDetail]:  # fmt: skip
        """Two models, or files of what they wrote, compared by rules or a reward model, as ``preftune compare`` does.

        Parameters
            first, second: a registered model that answers now, or ``{"file": ID}`` of completions.
            judge: ``{"name": "rules", "rules": [...]}``, or the name of a registered reward model.
            prompts: id of a file; two files of completions bring their own.
            settings: ``limit`` of prompts, ``margin``, ``temperature``, ``max_new_tokens``, ``metadata``.
        """
        sides = {"first": first, "second": second}
        body = {name: {"model": side} if isinstance(side, str) else side for name, side in sides.items()}
        asked = {"name": "reward_model", "model": judge} if isinstance(judge, str) else judge
        return calls.contest({**body, "judge": asked, "prompts": prompts, **settings})

    @asks
    def judged(self, evaluation_id: str, *, offset: int = 0, limit: int = 100) -> Call[Rows]:
        """Judged prompts of a finished contest: what both sides wrote, and the score: 1 where the first is better."""
        return calls.get(at("evaluations", evaluation_id, "rows"), Rows, offset=offset, limit=limit)

    @lists
    def list(self, *, limit: int = 100) -> Call[api.Page[api.Job]]:
        """Evaluations, newest first. limit: how many are fetched at once."""
        return calls.page(at("jobs"), api.Job, work="evaluate", limit=limit)

    @asks
    def get(self, evaluation_id: str) -> Call[api.JobDetail]:
        """One evaluation."""
        return calls.get(at("jobs", evaluation_id), api.JobDetail)


class Feedback:
    """What people say of completions that were kept (``store=True``, on a server that allows it)."""

    @asks
    def give(
        self, completion_id: str, *, choice: int = 0, rating: float | None = None, better_than: str | served.Better | None = None,
        edit: str | None = None,
    ) -> Call[served.FeedbackKept]:  # fmt: skip
        """Rate a completion from 0 (bad) to 1 (good), prefer it to another one, or correct it; at least one of them.

        Parameters
            completion_id: ``Answer.id``. choice: its number where several were asked for. better_than: the other one's id, or a
                ``Better`` that names its choice, a tie or a strength. edit: what the answer should have been.
        """
        better = {"over": better_than} if isinstance(better_than, str) else better_than and better_than.model_dump()
        body = {"completion_id": completion_id, "choice": choice, "rating": rating, "preference": better, "edit": edit}
        return calls.post(at("feedback"), served.FeedbackKept, body)  # the server says what is out of range


class Splits:
    """Traffic of a name split between two models, with the live result."""

    @asks
    def create(self, name: str, first: str, second: str, *, weight: float = 0.5) -> Call[served.Split]:
        """Split the traffic of a new name; the second model gets the share ``weight``, and a ``user`` always the same model."""
        return calls.post(at("splits"), served.Split, {"name": name, "models": [first, second], "weight": weight})

    @lists
    def list(self, *, limit: int = 100) -> Call[api.Page[served.Split]]:
        """Open splits with their results, newest first. limit: how many are fetched at once."""
        return calls.page(at("splits"), served.Split, limit=limit)

    @asks
    def get(self, name: str) -> Call[served.Split]:
        """The result so far."""
        return calls.get(at("splits", name), served.Split)

    @asks
    def close(self, name: str) -> Call[served.Split]:
        """End a split; its last result. Its name answers no more."""
        return calls.delete(at("splits", name), served.Split)


class Serving:
    """What is in memory to be asked (admin)."""

    @asks
    def state(self) -> Call[served.ServedBases]:
        """Every base in memory, its load and its adapters."""
        return calls.get(at("serving"), served.ServedBases)

    @asks
    def load(self, model: str) -> Call[served.Served]:
        """Bring a model's base into memory before it is asked."""
        return calls.put_by_post(at("serving", "load"), served.Served, {"model": model})

    @asks
    def unload(self, model: str) -> Call[served.Served]:
        """Take an adapter, or a base with its adapters, out of memory."""
        return calls.put_by_post(at("serving", "unload"), served.Served, {"model": model})


class Webhooks:
    """Addresses that are told when jobs end."""

    @lists
    def list(self) -> Call[api.Page[api.Webhook]]:
        """Webhooks of the project."""
        return calls.page(at("webhooks"), api.Webhook)

    @asks
    def add(self, url: str, *, events: Sequence[str] = (), name: str = "") -> Call[api.WebhookMade]:
        """Add a webhook; its secret is shown once."""
        return calls.post(at("webhooks"), api.WebhookMade, {"url": url, "events": [*events], "name": name})

    @asks
    def remove(self, webhook_id: str) -> Call[api.Deleted]:
        """Take a webhook away."""
        return calls.delete(at("webhooks", webhook_id), api.Deleted)


class Keys:
    """API keys (admin)."""

    @lists
    def list(self) -> Call[api.Page[api.Key]]:
        """Keys of the project, revoked ones too; never a value."""
        return calls.page(at("keys"), api.Key)

    @asks
    def add(self, name: str, role: api.Role = "developer", *, project: str | None = None) -> Call[api.KeyMade]:
        """Make a key; its value is shown once. project: by name; another than one's own only for the operator."""
        body = {"name": name, "role": role} | ({"project": project} if project else {})
        return calls.post(at("keys"), api.KeyMade, body)

    @asks
    def revoke(self, key_id: str) -> Call[api.Key]:
        """Revoke a key."""
        return calls.delete(at("keys", key_id), api.Key)


class Access:
    """Who asks, projects, the audit log, health."""

    @asks
    def me(self) -> Call[api.Me]:
        """Who asks."""
        return calls.get(at("me"), api.Me)

    @asks
    def health(self) -> Call[api.Health]:
        """Whether the server works, and what waits."""
        return calls.get(at("health"), api.Health)

    @lists
    def projects(self) -> Call[api.Page[api.Project]]:
        """The caller's project; all of them for an operator."""
        return calls.page(at("projects"), api.Project)

    @asks
    def add_project(self, name: str, description: str = "") -> Call[api.Project]:
        """Make a project."""
        return calls.post(at("projects"), api.Project, {"name": name, "description": description})

    @lists
    def audit(self, *, actor: str | None = None, action: str | None = None) -> Call[api.Page[api.AuditEntry]]:
        """Who did what, newest first. actor: the id of a key."""
        return calls.page(at("audit"), api.AuditEntry, actor=actor, action=action)

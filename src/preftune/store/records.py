"""What the database holds. Frozen; a change makes a new value under the same id.

Ids are the ones that clients see (``ft-``, ``file-``, ``ml_``). ``number`` is given by the store: it grows with every
insert of a kind and is what lists are ordered and paged by, because two records may share a time stamp.
"""

from __future__ import annotations

import re
import secrets
import uuid
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

JobStatus: TypeAlias = Literal[
    "validating", "queued", "running", "exporting", "paused", "cancelled", "succeeded", "failed"
]  # design.md section 6; a deleted job has ``deleted_at``
FileStatus: TypeAlias = Literal["pending", "uploaded", "processing", "processed", "error"]
Role: TypeAlias = Literal["admin", "developer", "annotator"]
Level: TypeAlias = Literal["info", "warn", "error"]

ACTIVE: tuple[JobStatus, ...] = ("validating", "queued", "running", "exporting", "paused")
ENDED: tuple[JobStatus, ...] = ("cancelled", "succeeded", "failed")


def now() -> datetime:
    """The time with its zone: what every record is stamped with. Nothing is decided by it (docs/adr/0020)."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """A fresh id: ``ft-`` and an UUID for jobs, else the prefix and 24 hexadecimal digits."""
    return f"{prefix}{uuid.uuid4()}" if prefix == "ft-" else f"{prefix}{secrets.token_hex(12)}"


STORED = object()  # the context of a validation of what a database gave back: every text of it went through ``storable``
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def storable(value: Any) -> Any:
    """The value with U+FFFD in the place of what no database keeps in a text: NUL, and halves of surrogate pairs.

    >>> storable({"a": ["x\\0y", 1]})
    {'a': ['x\ufffdy', 1]}
    """
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {storable(key): storable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(storable(one) for one in value)
    return value


class Record(BaseModel):
    """A row. ``kind`` names its table; ``filters`` are the fields that a list may be narrowed by."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]
    filters: ClassVar[frozenset[str]] = frozenset()

    id: str
    number: int = 0
    project: str
    created_at: datetime = Field(default_factory=now)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any, info: ValidationInfo) -> Any:
        return values if info.context is STORED else storable(values)


class Project(Record):
    """A room of its own for files, jobs, models and keys. ``project`` is its own id; ``serial`` is SeekrFlow's integer."""

    kind: ClassVar[str] = "projects"
    filters: ClassVar[frozenset[str]] = frozenset({"name", "serial"})

    name: str
    serial: int
    description: str = ""


class Key(Record):
    """An API key: only its hash is kept, and a prefix to recognise it by."""

    kind: ClassVar[str] = "keys"
    filters: ClassVar[frozenset[str]] = frozenset({"digest"})

    name: str
    role: Role
    digest: str
    prefix: str
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None


class File(Record):
    """An uploaded file. artifact: where its bytes are. purpose: as the client said it. report: what validation found."""

    kind: ClassVar[str] = "files"
    filters: ClassVar[frozenset[str]] = frozenset({"purpose", "sha256", "status"})

    filename: str
    purpose: str
    bytes: int = 0
    sha256: str = ""
    status: FileStatus = "pending"
    artifact: str = ""
    report: dict[str, Any] = Field(default_factory=dict)
    num_rows: int | None = None
    format: str = ""
    expires_at: datetime | None = None
    deleted_at: datetime | None = None


class Upload(Record):
    """An upload in parts. parts: number or id of each part to where its bytes are, its size and its digest."""

    kind: ClassVar[str] = "uploads"
    filters: ClassVar[frozenset[str]] = frozenset({"status", "file"})

    filename: str
    purpose: str
    bytes: int
    status: Literal["pending", "completed", "cancelled", "expired"] = "pending"
    parts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    file: str = ""
    sha256: str = ""
    expires_at: datetime | None = None


class Job(Record):
    """A piece of work that outlives a process.

    Parameters
        work: what is done: ``train``, ``evaluate``, ``generate``. dialect: who asked (``native``, ``openai`` ...).
        request: the body as it came, secrets taken out. recipe: what it means, resolved.
        files: ids of the files that it reads; it stays ``validating`` until all are processed.
        asked: ``cancel`` or ``pause`` while that is not done yet.
        worker, attempt, beat: who runs it, the how-manieth claim that is, and a count that the worker raises while it
            lives. Who writes as a worker names worker and attempt, so a worker that lost its job cannot write.
        forgiven: attempts that count no more, because the job got further in them or was stopped on purpose; it fails
            when ``max_attempts`` in a row brought it no further, or twice as many that ended with their worker: a worker dies
            for reasons of its own too.
        slots: what it takes of a worker: CPU slots or GPUs. priority: higher goes first.
        no_probe: nobody is to ask whether the model can do the task, nor to rehearse the run.
        name: of the model that it makes. idempotency: the client's key; the same key gives the same job.
        progress: step, steps, seconds left. result: what came out. error: code, message, param.
    """

    kind: ClassVar[str] = "jobs"
    filters: ClassVar[frozenset[str]] = frozenset({"status", "work", "dialect", "worker", "name", "idempotency"})

    work: str
    status: JobStatus = "validating"
    dialect: str = "native"
    request: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    no_probe: bool = False
    model: str = ""
    files: tuple[str, ...] = ()
    name: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)
    priority: int = 0
    slots: int = 1
    asked: Literal["", "cancel", "pause"] = ""
    worker: str = ""
    attempt: int = 0
    max_attempts: int = 3
    forgiven: int = 0
    beat: int = 0
    idempotency: str | None = None
    run_folder: str = ""
    progress: dict[str, Any] = Field(default_factory=dict)
    result: dict[str, Any] = Field(default_factory=dict)
    error: dict[str, Any] = Field(default_factory=dict)
    updated_at: datetime = Field(default_factory=now)
    started_at: datetime | None = None
    finished_at: datetime | None = None
    deleted_at: datetime | None = None

    @property
    def has_attempts_left(self) -> bool:
        """Whether it may be claimed again after its process died."""
        return self.attempt - self.forgiven < self.max_attempts

    @property
    def has_workers_left(self) -> bool:
        """Whether it may be claimed again after its worker died."""
        return self.attempt - self.forgiven < 2 * self.max_attempts


class Event(Record):
    """Something that happened to a subject (a job, a model, an alias); appended, never changed."""

    kind: ClassVar[str] = "events"
    filters: ClassVar[frozenset[str]] = frozenset({"subject", "type", "level"})

    subject: str
    type: str
    level: Level = "info"
    message: str = ""
    step: int | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class DatasetVersion(Record):
    """An immutable data set: its files, its digest and its counts. A name has versions 1, 2, ..."""

    kind: ClassVar[str] = "datasets"
    filters: ClassVar[frozenset[str]] = frozenset({"name", "digest"})

    name: str
    version: int
    digest: str
    files: tuple[str, ...] = ()
    annotators: tuple[str, ...] = ()
    counts: dict[str, int] = Field(default_factory=dict)
    artifact: str = ""


class ModelVersion(Record):
    """An immutable model: weights with their digest and where they come from. A name has versions 1, 2, ...

    form: ``base``, ``full``, ``adapter``. base: id of the model that an adapter belongs to. job, run, datasets: lineage.
    """

    kind: ClassVar[str] = "models"
    filters: ClassVar[frozenset[str]] = frozenset({"name", "digest", "job", "form"})

    name: str
    version: int
    form: Literal["base", "full", "adapter"]
    digest: str = ""
    base: str = ""
    parent: str = ""
    job: str = ""
    run: str = ""
    step: int | None = None
    datasets: tuple[str, ...] = ()
    artifact: str = ""
    facts: dict[str, Any] = Field(default_factory=dict)
    deleted_at: datetime | None = None


class Alias(Record):
    """A movable name for a model version (``production``). Its history is the events whose subject is its id."""

    kind: ClassVar[str] = "aliases"
    filters: ClassVar[frozenset[str]] = frozenset({"name", "model"})

    name: str
    model: str
    updated_at: datetime = Field(default_factory=now)


class Secret(Record):
    """A value that is kept encrypted, such as a judge's key."""

    kind: ClassVar[str] = "secrets"
    filters: ClassVar[frozenset[str]] = frozenset({"name"})

    name: str
    ciphertext: str


class Webhook(Record):
    """An address that is told of events. secret: id of the signing secret."""

    kind: ClassVar[str] = "webhooks"

    url: str
    events: tuple[str, ...]
    secret: str
    name: str = ""
    deleted_at: datetime | None = None


class Audit(Record):
    """Who did what: the key (never its value), the action, and what it was done to."""

    kind: ClassVar[str] = "audit"
    filters: ClassVar[frozenset[str]] = frozenset({"actor", "action"})

    actor: str
    action: str
    target: str = ""
    detail: dict[str, Any] = Field(default_factory=dict)


class Capture(Record):
    """A served completion that was kept, by consent; what was said of it are its events.

    messages: the prompt; none where only who answered is kept, for a split. choice: its number in the request's answer.
    split, unit: the split that assigned it, and the hashed user (or request) that it was assigned to.
    """

    kind: ClassVar[str] = "captures"
    filters: ClassVar[frozenset[str]] = frozenset({"model", "request"})

    model: str
    request: str
    messages: list[dict[str, Any]]
    completion: str
    choice: int = 0
    split: str = ""
    unit: str = ""


class Resource(Record):
    """A thing that only one dialect has: an evaluation's definition, a deployment, an endpoint. body: in that dialect."""

    kind: ClassVar[str] = "resources"
    filters: ClassVar[frozenset[str]] = frozenset({"type", "name"})

    type: str
    name: str = ""
    body: dict[str, Any] = Field(default_factory=dict)
    deleted_at: datetime | None = None


KINDS: tuple[type[Record], ...] = (
    Project, Key, File, Upload, Job, Event, DatasetVersion, ModelVersion, Alias, Secret, Webhook, Audit, Capture, Resource,
)  # fmt: skip
UNIQUE: dict[str, tuple[tuple[str, ...], ...]] = {
    "projects": (("name",), ("serial",)),
    "keys": (("digest",),),
    "jobs": (("project", "idempotency"),),
    "datasets": (("project", "name", "version"),),
    "models": (("project", "name", "version"),),
    "aliases": (("project", "name"),),
    "secrets": (("project", "name"),),
}

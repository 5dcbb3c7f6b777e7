"""The words of the native API (/api/v1): what a server answers with and a client reads. One definition for both.

A client ignores fields that it does not know, so a newer server may say more.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

MAX_PAGE = 1000
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
JobStatus = Literal["validating", "queued", "running", "exporting", "paused", "cancelled", "succeeded", "failed"]
ENDED: tuple[JobStatus, ...] = ("cancelled", "succeeded", "failed")
FileStatus = Literal["pending", "uploaded", "processing", "processed", "error"]
Role = Literal["admin", "developer", "annotator"]
Level = Literal["info", "warn", "error"]
MetricsKind = Literal["step", "eval", "probe"]
WeightsForm = Literal["merged", "adapter"]


class Word(BaseModel):
    """A thing of the API: frozen, and open to fields of newer servers."""

    model_config = ConfigDict(frozen=True, extra="ignore")


T = TypeVar("T", bound=Word)


class Page(Word, Generic[T]):
    """A part of a list. next: what to send as ``after`` for the part behind it; None at the end."""

    data: tuple[T, ...]
    has_more: bool
    next: str | None = None


class ErrorFacts(Word):
    """What went wrong: a sentence that says what to do, the kind of error, the field at fault, a stable code."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Word):
    """The body of every answer that is no success."""

    error: ErrorFacts


class File(Word):
    """An uploaded file. status: ``processed`` once it is validated, ``error`` where no job can use it (``error`` says why)."""

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    status: FileStatus
    format: str
    num_rows: int | None
    error: str | None
    created_at: datetime


class BadRow(Word):
    """A row that was left out of a file: its line, a stable reason, the field at fault, a sentence."""

    line: int
    reason: str
    field: str | None = None
    message: str


class FileReport(Word):
    """What validation found. valid: None while it is not done. kinds: judgements and how many rows have each."""

    file: str
    valid: bool | None
    format: str
    num_rows: int | None
    num_excluded: int
    bad_rows: tuple[BadRow, ...]
    kinds: dict[str, int]
    annotators: tuple[str, ...]
    error: str | None


class Deleted(Word):
    """What was deleted."""

    id: str
    deleted: bool = True


class Progress(Word):
    """How far a job is. fraction: of its training, 0 to 1. metrics: of its last step, by TRL's names."""

    stage: str | None = None
    step: int = 0
    steps: int | None = None
    fraction: float | None = None
    seconds_left: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)


class JobError(Word):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class Job(Word):
    """A piece of work. name: of the model it makes, which answers once it has succeeded. asked: what it was asked to do and
    has not done yet. attempts: how often a worker began it."""

    id: str
    work: str
    status: JobStatus
    dialect: str
    model: str
    name: str
    files: tuple[str, ...]
    metadata: dict[str, str]
    priority: int
    attempts: int
    asked: str
    progress: Progress
    error: JobError | None
    result: dict[str, Any]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will happen to it by itself."""
        return self.status in ENDED


class JobDetail(Job):
    """A job with what it does: the resolved recipe, every default written out. no_probe: see ``NewJob``."""

    recipe: dict[str, Any]
    no_probe: bool = False


class WandbReport(BaseModel):
    """The W&B run that a job reports to.

    api_key: kept encrypted, never shown, given to the training process alone; without one the server's own WANDB_API_KEY is used,
    if it has one. base_url: of another W&B server; it needs an api_key.
    """

    model_config = ConfigDict(extra="forbid")

    project: Annotated[str, Field(min_length=1, max_length=128)] = "preftune"
    entity: Annotated[str, Field(max_length=128)] = ""
    name: Annotated[str, Field(max_length=128)] = ""
    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=64)] = []
    api_key: Annotated[str, Field(max_length=512)] = ""
    base_url: Annotated[str, Field(max_length=2000)] = ""


class NewJob(BaseModel):
    """A training job: a ``recipe`` (as for `preftune train`, with ids of files and names of models in the place of paths), or
    the simple fields.

    method: a loss (`preftune ls losses`); loss: its options; options: any other key of a recipe's stage. model may be left out
    with ``from_checkpoint`` (a job, ``JOB:STEP`` or a model). suffix: part of the new model's name. priority: higher goes
    first. wandb: where it reports to. no_probe: as `train --no-probe`: whether the model can do the task is not asked.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: dict[str, Any] | None = None
    model: Annotated[str, Field(max_length=512)] | None = None
    files: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=100)] = []
    validation: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    method: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    loss: dict[str, Any] = {}
    options: dict[str, Any] = {}
    from_checkpoint: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] = ""
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
    ] = {}
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    wandb: WandbReport | None = None
    no_probe: bool = False


class Retry(BaseModel):
    """Why a job is tried again; kept among its events. no_probe: from here on as in a new job."""

    model_config = ConfigDict(extra="forbid")
    reason: Annotated[str, Field(min_length=1, max_length=1000)]
    no_probe: bool = False


class Priority(BaseModel):
    """Where a job stands among those that wait: higher goes first."""

    model_config = ConfigDict(extra="forbid")

    priority: Annotated[int, Field(ge=-100, le=100)]


class Event(Word):
    """Something that happened to a job, a model or an alias; never changed."""

    id: str
    subject: str
    type: str
    level: Level
    message: str
    step: int | None
    data: dict[str, Any]
    created_at: datetime


class Metrics(Word):
    """Numbers of a step, by TRL's names. kind: of a training ``step``, of held-out rows (``eval``), or of the ``probe``."""

    id: str
    step: int
    stage: str
    kind: MetricsKind
    metrics: dict[str, float | None]
    created_at: datetime


class JobLog(Word):
    """What a job's process printed, from a byte on. next: where to go on reading."""

    text: str
    next: int
    has_more: bool


class Model(Word):
    """A version of a model. form: ``base`` (offered by the operator), ``full`` weights or an ``adapter`` on ``base``."""

    id: str
    name: str
    version: int
    form: Literal["base", "full", "adapter"]
    base: str | None
    parent: str | None
    job: str | None
    step: int | None
    files: tuple[str, ...]
    metrics: dict[str, float | None]
    created_at: datetime


class LineageFile(Word):
    """A file in a lineage, and who judged its rows. filename None: it was deleted."""

    id: str
    filename: str | None
    sha256: str
    annotators: tuple[str, ...]


class Lineage(Word):
    """Where a model comes from, nearest first: models it was trained from, the jobs that made them, their files."""

    model: Model
    parents: tuple[Model, ...]
    jobs: tuple[Job, ...]
    files: tuple[LineageFile, ...]


class Alias(Word):
    """A movable name for a model version, which clients may ask by."""

    id: str
    name: str
    model: str
    model_name: str | None
    updated_at: datetime


class SetAlias(BaseModel):
    """Where an alias shall point: a model's name or id, and why."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=512)]
    reason: Annotated[str, Field(max_length=1000)] = ""


class Webhook(Word):
    """An address that is told when a job ends."""

    id: str
    url: str
    events: tuple[str, ...]
    name: str
    created_at: datetime


class WebhookMade(Webhook):
    """A new webhook with its signing secret, which is shown once."""

    secret: str


class NewWebhook(BaseModel):
    """An address to tell, and of which types of events; all of them by default."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    events: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=32)] = []
    name: Annotated[str, Field(max_length=128)] = ""


class Key(Word):
    """An API key without its value. prefix: its first characters, to know it by."""

    id: str
    name: str
    role: Role
    prefix: str
    project: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


class KeyMade(Key):
    """A new key with its value, which is shown once."""

    value: str


class NewKey(BaseModel):
    """A key to make. project: its name; only an admin of the default project may name another than their own."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=128)]
    role: Role = "developer"
    project: Annotated[str, Field(min_length=1, max_length=64, pattern=NAME)] | None = None


class Me(Word):
    """Who asks."""

    key: str
    role: Role
    project: str
    project_name: str


class Project(Word):
    """A room of its own for files, jobs, models and keys."""

    id: str
    name: str
    description: str
    created_at: datetime


class NewProject(BaseModel):
    """A project to make."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=NAME)]
    description: Annotated[str, Field(max_length=1000)] = ""


class AuditEntry(Word):
    """Who did what: the key, the action, and what it was done to."""

    id: str
    actor: str
    action: str
    target: str
    detail: dict[str, Any]
    created_at: datetime


class Health(Word):
    """Whether the server works, and what it has to do in the caller's project."""

    status: Literal["ok"]
    version: str
    jobs: dict[str, int]

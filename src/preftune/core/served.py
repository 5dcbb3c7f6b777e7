"""The words of /api/v1 about models that are asked: what is in memory, what people say of answers, split traffic, comparisons."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from preftune.core.api import Word

FeedbackKind = Literal["preferences", "ratings"]
Verdict = Literal["better", "worse", "inconclusive"]
ServedName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Better(_Body):
    """The completion that the one in question is better than, or as good as (``tie``). strength: 0 to 3."""

    over: Annotated[str, Field(min_length=1, max_length=128)]
    choice: Annotated[int, Field(ge=0, le=127)] = 0
    tie: bool = False
    strength: Annotated[float, Field(ge=0, le=3)] = 0.0


class Feedback(_Body):
    """Of one completion: a rating from 0 (bad) to 1 (good), a preference over another one, an edit; at least one."""

    completion_id: Annotated[str, Field(min_length=1, max_length=128)]
    choice: Annotated[int, Field(ge=0, le=127)] = 0
    rating: Annotated[float, Field(ge=0, le=1)] | None = None
    preference: Better | None = None
    edit: Annotated[str, Field(min_length=1, max_length=1 << 20)] | None = None


class FeedbackKept(Word):
    """Feedback that was kept, and of which completion."""

    object: Literal["feedback"] = "feedback"
    id: str
    completion_id: str
    choice: int


class SplitRequest(_Body):
    """A new split: its name, two models, and the share of requests that the second one gets."""

    name: ServedName
    models: Annotated[list[ServedName], Field(min_length=2, max_length=2)]
    weight: float = 0.5


class Estimate(Word):
    """A number with its 95 % interval (low, high) and how that was made."""

    interval: tuple[float, float]
    method: str


class Difference(Estimate):
    """Mean rating of the second model minus that of the first."""

    value: float


class SplitWinRate(Estimate):
    """Of the second model over the first. comparisons: of two answers; units: users (or requests) they came from."""

    mean: float
    comparisons: int
    units: int


class Arm(Word):
    """One of the two models: answers, ratings, rated units, and their mean rating (0 to 1) with its 95 % interval."""

    model: str
    requests: int
    ratings: int
    units: int
    mean: float | None = None
    interval: tuple[float, float] | None = None
    method: str | None = None


class Split(Word):
    """Traffic of a name split between two models, and the result so far. weight: the share of the second.

    verdict: of the second against the first, where the interval leaves out no difference.
    """

    object: Literal["split"] = "split"
    id: str
    name: str
    weight: float
    arms: tuple[Arm, ...]
    difference: Difference | None = None
    win_rate: SplitWinRate | None = None
    verdict: Verdict
    deleted: bool = False


class ServedBase(Word):
    """A base model in memory, by the name that it is asked by: its process or the server behind it, and what it does now.

    growing: answers being written; reading: prompts being read; waiting: requests in the queue. adapters: name (another
    project's: id) to bytes, None where another server keeps them. positions: the longest conversation, in tokens. reason: why
    answers are not batched.
    """

    base: str
    pid: int | None = None
    upstream: str | None = None
    dtype: str | None = None
    positions: int | None = None
    reason: str | None = None
    growing: int | None = None
    reading: int | None = None
    waiting: int | None = None
    adapters: dict[str, int | None] = Field(default_factory=dict)


class ServedBases(Word):
    """Every base in memory."""

    object: Literal["list"] = "list"
    data: tuple[ServedBase, ...]


class Served(Word):
    """A model that was brought into memory, or taken out."""

    object: Literal["serving"] = "serving"
    model: str
    loaded: bool


class EvaluationMade(Word):
    """An evaluation that was queued. workflow_id: the id of its job (``id`` is the same)."""

    workflow_id: str
    status: str

    @property
    def id(self) -> str:
        """What ``jobs.wait`` and ``evaluations.rows`` name it by."""
        return self.workflow_id


class AskedModel(_Body):
    """A model that judges or answers: one of the server's, or one elsewhere (``url``, and a token that is kept encrypted).

    system: a system message; input: what each row is turned into; both templates over the row's columns, as ``{{prompt}}``.
    """

    model: str
    system: str = ""
    input: str = "{{prompt}}"
    max_tokens: int | None = None
    temperature: float | None = None
    url: str | None = None
    token: str | None = None

    def as_judge(self) -> dict[str, Any]:
        """What the evaluation route is told of a judge."""
        told: dict[str, Any] = {"model": self.model, "system_template": self.system}
        told |= {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.url is not None:
            told |= {"model_source": "external", "external_base_url": self.url, "external_api_token": self.token}
        return {name: value for name, value in told.items() if value is not None}

    def as_writer(self) -> dict[str, Any]:
        """The same of a model whose answers are evaluated."""
        return {**self.as_judge(), "input_template": self.input}

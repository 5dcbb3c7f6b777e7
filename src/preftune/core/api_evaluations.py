"""The words of the native API's evaluations; the rest of its words are in :mod:`preftune.core.api`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from preftune.core.api import Word


class Side(BaseModel):
    """One side of a comparison: a registered model that answers now, or a file of completions that were written before."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    file: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class NewEvaluation(BaseModel):
    """A comparison of two sides over the prompts of a file.

    judge: ``{name: rules, rules: [...], tie_margin, title}``, or ``{name: reward_model, model: NAME, ...}`` with the name of a
    registered model. prompts: id of a file; two files of completions bring their own. limit: of prompts. margin: half-width
    around one half within which the sides count as equivalent. temperature, max_new_tokens: of answers that are written now.
    """

    model_config = ConfigDict(extra="forbid")

    first: Side
    second: Side
    judge: dict[str, Any]
    prompts: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    limit: Annotated[int, Field(ge=1, le=100_000)] | None = None
    margin: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] | None = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
    ] = {}


class Rows(Word):
    """Judged rows, in their order."""

    data: list[dict[str, Any]]
    has_more: bool

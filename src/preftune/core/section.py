"""What every part of a recipe is: a frozen pydantic model that refuses unknown keys."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from annotated_types import Gt, Interval
from pydantic import BaseModel, ConfigDict

Positive: TypeAlias = Annotated[int, Gt(0)]
Share: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

"""What every part of a recipe is: a frozen pydantic model that refuses unknown keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeAlias, get_args

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt
from pydantic import BaseModel, ConfigDict

Positive: TypeAlias = Annotated[int, Gt(0)]
Share: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def range_of(annotation: Any) -> str:
    """The bounds of an annotated number, in words; empty where it has none.

    >>> range_of(Share), range_of(Positive | None), range_of(str)
    ('at least 0 and below 1', 'above 0', '')
    """
    words = {Gt: "above", Ge: "at least", Lt: "below", Le: "at most"}
    return " and ".join(f"{words[type(one)]} {_bound(one):g}" for one in bounds_of(annotation))


def bounds_of(annotation: Any) -> Iterator[Gt | Ge | Lt | Le]:
    """The bounds inside ``Annotated[X, ...]``, also of one member of a union and behind other metadata."""
    for part in getattr(annotation, "__metadata__", ()):
        for one in part if isinstance(part, GroupedMetadata) else (part,):
            if isinstance(one, (Gt, Ge, Lt, Le)):
                yield one
    for inner in get_args(annotation):
        yield from bounds_of(inner)


def _bound(one: Gt | Ge | Lt | Le) -> float:
    (value,) = (getattr(one, name) for name in ("gt", "ge", "lt", "le") if hasattr(one, name))
    return float(value)


def explain(errors: Sequence[Mapping[str, Any]], hint: Any = None) -> str:
    """What is wrong with a value, in one line: pydantic's words, the whole range where there is one, and what was given.

    Parameters
        errors: those of ``ValidationError.errors()`` that are about one field: several where it may be this or that.
        hint: the annotation of the field, where it is known.
    """
    message, given = " or ".join(dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in errors)), errors[0]["input"]
    if errors[0]["type"] == "value_error" and isinstance(given, Mapping):
        return message  # of a whole section: it says itself what of it is wrong
    bounds = range_of(hint)
    return f"{message}{f' ({bounds})' if ' and ' in bounds else ''}, got {given!r}"

"""What every part of a recipe is: a frozen pydantic model that refuses unknown keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

Positive: TypeAlias = Annotated[int, Gt(0)]
Share: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]
Seed: TypeAlias = Annotated[int, Interval(ge=0, lt=2**63)]
"""What torch's and NumPy's generators both take."""


class Section(BaseModel):
    """A frozen part of a recipe; unknown keys are refused, and so is yes or no where a number belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        if isinstance(value, bool) and takes_number(cls.model_fields[name].annotation):
            raise ValueError(f"write {describe(get_type_hints(cls, include_extras=True)[name])}")
        return value


def range_of(annotation: Any) -> str:
    """The bounds of an annotated number, in words; empty where it has none.

    >>> range_of(Share), range_of(Positive | None), range_of(str)
    ('at least 0 and below 1', 'above 0', '')
    """
    words = {Gt: "above", Ge: "at least", Lt: "below", Le: "at most"}
    return " and ".join(dict.fromkeys(f"{words[type(one)]} {_bound(one)}" for one in bounds_of(annotation)))


def bounds_of(annotation: Any) -> Iterator[Gt | Ge | Lt | Le]:
    """The bounds inside ``Annotated[X, ...]``, also of one member of a union and behind other metadata."""
    for part in getattr(annotation, "__metadata__", ()):
        for one in part if isinstance(part, GroupedMetadata) else (part,):
            if isinstance(one, (Gt, Ge, Lt, Le)):
                yield one
    for inner in get_args(annotation):
        yield from bounds_of(inner)


def _bound(one: Gt | Ge | Lt | Le) -> str:
    (value,) = (getattr(one, name) for name in ("gt", "ge", "lt", "le") if hasattr(one, name))
    return f"{float(value):g}" if abs(value) < 1e6 else f"{value:,}"


def takes_number(annotation: Any) -> bool:
    """Whether a field takes a number and not yes or no, which Python would read as 1 or 0.

    >>> takes_number(Share | None), takes_number(bool), takes_number(str)
    (True, False, False)
    """
    members = list(_members(annotation))
    return bool not in members and any(one in (int, float) for one in members)


def describe(annotation: Any) -> str:
    """What a field takes, in the words of one who writes a recipe.

    >>> describe(Share), describe(Positive | None), describe(tuple[str, ...])
    ('a number at least 0 and below 1', 'a whole number above 0 or null', 'a list, each entry text')
    >>> describe(Literal["lora", "full"]), describe(bool), describe(dict[str, int])
    ("'lora' or 'full'", 'true or false', 'a mapping of keys and values')
    """
    origin, given = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = range_of(annotation) if not list(bounds_of(given[0])) else ""
        return f"{describe(given[0])} {bounds}".rstrip()
    if origin in (Union, UnionType):
        return " or ".join(describe(one) for one in given)
    if origin is Literal:
        *words, last = (repr(one) for one in given)
        return f"{', '.join(words)} or {last}" if words else last
    if origin is tuple:
        count = "" if given[-1] is Ellipsis else f" of {len(given)}"
        return f"a list{count}" if given[0] is Any else f"a list{count}, each entry {describe(given[0])}"
    is_mapping = origin is not None or (isinstance(annotation, type) and issubclass(annotation, BaseModel))
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return "a mapping of keys and values" if is_mapping else plain.get(annotation, "another value")


LENGTHS = {
    "too_short": ("at least", "entry"),
    "too_long": ("at most", "entry"),
    "string_too_short": ("at least", "character"),
    "string_too_long": ("at most", "character"),
}
"""Of pydantic's errors about a length: which bound it passed, and what is counted."""
PLURALS = {"entry": "entries", "character": "characters"}


def explain(errors: Sequence[Mapping[str, Any]], hint: Any = None) -> str:
    """What is wrong with a value, in one line: what the field takes, with its range, and what was given.

    Parameters
        errors: those of ``ValidationError.errors()`` that are about one field: several where it may be this or that.
        hint: the annotation of the field, where it is known; pydantic's words stand in for it otherwise.
    """
    first, given = errors[0], errors[0]["input"]
    own = [one["msg"].removeprefix("Value error, ") for one in errors if one["type"] == "value_error"]
    if own:
        return own[0] if isinstance(given, Mapping) else f"{own[0]}, got {given!r}"  # of a section: it says itself what is wrong
    if first["type"] == "missing":
        return f"is missing; write {describe(hint)}" if hint is not None else "is missing"
    if len(errors) == 1 and first["type"] in LENGTHS:
        bound, what = LENGTHS[first["type"]]
        least = first["ctx"]["min_length" if bound == "at least" else "max_length"]
        return f"write {bound} {least} {what if least == 1 else PLURALS[what]}, got {given!r}"
    message = " or ".join(dict.fromkeys(one["msg"] for one in errors)) if hint is None else f"write {describe(hint)}"
    return f"{message}, got {given!r}"


def _members(annotation: Any) -> Iterator[Any]:
    """The plain types inside ``Annotated`` and unions; what a list or a mapping holds is not among them."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _members(one)
    else:
        yield annotation

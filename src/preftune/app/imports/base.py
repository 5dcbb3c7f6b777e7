"""What a source of jobs is: a table that says of every key what becomes of it, and one step for what several keys decide."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

from preftune.core.errors import InputError
from preftune.core.registry import Registry


class CannotCarry(Exception):
    """A value that a recipe has no place for; the text is the reason."""


def unchanged(value: Any) -> Any:
    """The value as it is."""
    return value


@dataclass(frozen=True, slots=True)
class To:
    """The key becomes a recipe's key.

    path: dotted, such as ``model.revision``, ``lr`` or ``loss.beta``. convert: raises CannotCarry for a value that has no
    counterpart. note: where it means something else here.
    """

    path: str
    convert: Callable[[Any], Any] = unchanged
    note: str = ""


@dataclass(frozen=True, slots=True)
class Leave:
    """The key is not carried. fine: values with which nothing is lost, because preftune does that anyway."""

    reason: str
    fine: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Read:
    """The key is one of several that decide something together; ``finish`` of the source reads it."""

    what: str


Rule: TypeAlias = To | Leave | Read
Table: TypeAlias = Mapping[str, Rule]


def leave(reason: str, keys: str, *fine: Any) -> dict[str, Rule]:
    """One reason for several keys."""
    return {key: Leave(reason, fine) for key in keys.split()}


def read(what: str, keys: str) -> dict[str, Rule]:
    """Several keys that decide one thing together."""
    return {key: Read(what) for key in keys.split()}


@dataclass(slots=True)
class Job:
    """A job on its way to a recipe.

    values: what the source says, flat, its defaults filled in. defaults: keys that only the defaults name.
    devices: accelerators that the job ran on. trainer: which of the source's trainers, where the file does not say.
    recipe: what has been carried. carried: key -> recipe key. notes: what means something else. left: key -> reason.
    """

    values: dict[str, Any]
    defaults: frozenset[str] = frozenset()
    devices: int = 1
    trainer: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; the default where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def put(self, path: str, value: Any, *keys: str) -> None:
        """Set a recipe's key and say which keys it came from."""
        target = self.recipe
        *parents, last = path.split(".")
        for parent in parents:
            inner = target.get(parent)
            target[parent] = {"name": inner} if isinstance(inner, str) else inner if isinstance(inner, dict) else {}
            target = target[parent]
        target[last] = value
        for key in keys:
            if key in self.values:
                self.carried[key] = path

    def note(self, text: str) -> None:
        """Say that something means something else here."""
        if text not in self.notes:
            self.notes.append(text)

    def leave(self, key: str, reason: str) -> None:
        """Say that a key was not carried; silent for a default of the source that nobody wrote."""
        if key not in self.defaults:
            self.left[key] = reason


class JobSource(Protocol):
    """A system whose jobs can be read: its table, its defaults, how it is recognised, and what several keys decide."""

    table: ClassVar[Table]
    defaults: ClassVar[Mapping[str, Any]]

    def matches(self, given: Mapping[str, Any]) -> bool:
        """Whether a file is one of this system."""

    def flatten(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keys and values; keys of mappings inside are dotted."""

    def finish(self, job: Job) -> None:
        """Set what several keys decide together."""


job_sources: Registry[JobSource] = Registry("source of jobs", "preftune.app.imports")


def flat(given: Mapping[str, Any], deep: tuple[str, ...] = (), prefix: str = "") -> dict[str, Any]:
    """Keys and values, with the mappings under the keys of ``deep`` taken apart into dotted keys."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name in deep:
            found.update(flat(value, deep, f"{name}."))
        else:
            found[name] = value
    return found


def carry(source: JobSource, given: Mapping[str, Any], devices: int, trainer: str) -> Job:
    """Every key of a job through the source's table."""
    values = source.flatten(given)
    written = {key for key, value in values.items() if value is not None}
    filled = {key: value for key, value in source.defaults.items() if key not in written}
    job = Job({**values, **filled}, frozenset(filled), devices, trainer)
    job.recipe["method"] = "dpo"
    for key, value in job.values.items():
        if value is not None:
            _apply(job, source.table, key, value)
    source.finish(job)
    for key, value in job.values.items():
        rule = source.table.get(key)
        is_open = isinstance(rule, Read) and value is not None and key not in job.carried and key not in job.left
        if is_open and isinstance(rule, Read):
            job.leave(key, f"says nothing to a recipe here ({rule.what})")
    return job


def _apply(job: Job, table: Table, key: str, value: Any) -> None:
    rule = table.get(key)
    match rule:
        case None:
            near = difflib.get_close_matches(key, list(table), n=1, cutoff=0.75)
            job.leave(key, f"unknown key{f'; did you mean {near[0]!r}?' if near else ''}")
        case Leave():
            if value in rule.fine:
                job.carried[key] = "as preftune does anyway"
            else:
                job.leave(key, rule.reason)
        case To():
            try:
                job.put(rule.path, rule.convert(value), key)
            except CannotCarry as error:
                job.leave(key, str(error))
                return
            if rule.note and key not in job.defaults:
                job.note(f"{key}: {rule.note}")
        case Read():
            pass


def number(value: Any) -> float:
    """A number, also one that YAML 1.1 reads as text (5e-7)."""
    if isinstance(value, bool):
        raise CannotCarry(f"is {value!r}, not a number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise CannotCarry(f"is {value!r}, not a number; preftune's own default is used") from None


def positive(value: Any) -> float:
    """A number above 0."""
    found = number(value)
    if not found > 0:
        raise CannotCarry(f"is {value!r}, which means unset or off")
    return found


def count(value: Any) -> int:
    """A whole number above 0."""
    return int(positive(value))


def whole(value: Any) -> int:
    """A whole number."""
    return int(number(value))


def flag(value: Any) -> bool:
    """True or false, also as text."""
    return value if isinstance(value, bool) else str(value).lower() in {"true", "1", "yes", "on"}


def one_of(**values: Any) -> Callable[[Any], Any]:
    """A conversion by a table of values."""

    def convert(value: Any) -> Any:
        if str(value) not in values:
            raise CannotCarry(f"{value!r} has no counterpart; there is {', '.join(dict.fromkeys(map(str, values.values())))}")
        return values[str(value)]

    return convert


def required_number(job: Job, key: str) -> float:
    """A number that must be one; InputError names the key."""
    try:
        return number(job.get(key))
    except CannotCarry as error:
        raise InputError(f"{key}: {error}") from None

"""A name -> factory table with validated options, errors that list what exists, and entry points for third parties."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from preftune.core.errors import UnknownName, UsageError
from preftune.core.section import describe, explain, takes_number

T = TypeVar("T")


def suggest(wrong: str, known: list[str]) -> str:
    """The end of an error message: the nearest known name, or all of them.

    >>> suggest("betta", ["beta", "lr"])
    "did you mean 'beta'?"
    >>> suggest("x", ["beta", "lr"])
    'there is beta, lr'
    """
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known)}"


class Registry(Generic[T]):
    """Factories by name. Registration is one decorator; building validates the options.

    Parameters
        kind: what is registered, in the words of an error message ("loss").
        package: the package whose modules hold the built-in leaves; imported on first use.
        group: the entry-point group in which third parties register theirs ("preftune.losses").
    """

    def __init__(self, kind: str, package: str, group: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._group = group
        self._factories: dict[str, type[T]] = {}
        self._lock = threading.RLock()
        self._is_loading = self._is_loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """A class decorator that files a factory under ``name``; a second one under it is an error at import."""

        def add(factory: type[T]) -> type[T]:
            if name in self._factories:
                raise ValueError(f"{self.kind} {name!r} is already registered by {self._factories[name]!r}")
            self._factories[name] = factory
            return factory

        return add

    def build(self, name: str, options: Mapping[str, Any] | None = None) -> T:
        """The leaf of that name with its options checked; UsageError names the option at fault."""
        factory = self.factory(name)
        known = [field.name for field in dataclasses.fields(cast(Any, factory)) if field.init]
        for option in options or {}:
            if option not in known:
                raise UnknownName(f"{self.kind} {name!r} has no option {option!r}: {suggest(option, known)}")
        hints = get_type_hints(factory, include_extras=True)
        for option, value in (options or {}).items():
            is_switch = isinstance(value, bool) and takes_number(hints[option])  # Python reads yes as 1
            if is_switch or (isinstance(value, float) and not math.isfinite(value)):
                raise UsageError(f"{self.kind} {name!r}, option {option!r}: write {describe(hints[option])}, got {value!r}")
        try:
            return TypeAdapter(factory).validate_python(dict(options or {}))
        except ValidationError as error:
            first = error.errors()[0]
            where = str(first["loc"][0]) if first["loc"] else "options"  # what follows names a member of a union
            about = [one for one in error.errors() if one["loc"][:1] == first["loc"][:1]]
            raise UsageError(f"{self.kind} {name!r}, option {where!r}: {explain(about, hints.get(where))}") from None

    def factory(self, name: str) -> type[T]:
        """The registered class itself; UnknownName lists what there is."""
        self._load()
        if name not in self._factories:
            raise UnknownName(f"no {self.kind} {name!r}: {suggest(name, self.names())}")
        return self._factories[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._factories)

    def _load(self) -> None:
        if self._is_loaded:
            return
        with self._lock:  # a server's threads ask at once: none may see a table that is half full
            if self._is_loaded or self._is_loading:  # loading: this very thread, from a leaf that it imports
                return
            self._is_loading = True
            try:
                package = importlib.import_module(self._package)
                for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
                    importlib.import_module(module.name)
                if self._group is not None:
                    for point in entry_points(group=self._group):
                        point.load()
                self._is_loaded = True
            finally:
                self._is_loading = False

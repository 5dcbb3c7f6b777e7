"""Requests as methods of both clients: a noun is described once, and a description becomes a method that waits or is awaited.

A description is a function from what the caller gives to a ``Call``. On a part of ``Client`` it is a method that answers with
what the call reads; on one of ``AsyncClient`` a coroutine of that. Types, names of arguments and docstrings are the function's.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from preftune.core import api
from preftune.sdk.calls import Call

if TYPE_CHECKING:
    from preftune.sdk.async_client import AsyncClient
    from preftune.sdk.client import Client

P = ParamSpec("P")
T = TypeVar("T")
W = TypeVar("W", bound=api.Word)


class Part:
    """A noun of ``Client``."""

    def __init__(self, client: Client) -> None:
        self._client = client


class AsyncPart:
    """A noun of ``AsyncClient``."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client


class asks(Generic[P, T]):  # noqa: N801 -- used as a decorator
    """One request, and what it answers."""

    def __init__(self, build: Callable[Concatenate[Any, P], Call[T]]) -> None:
        self._build = build

    @overload
    def __get__(self, part: None, owner: type) -> Callable[Concatenate[Any, P], Call[T]]: ...
    @overload
    def __get__(self, part: Part, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, part: AsyncPart, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, part: Part | AsyncPart | None, owner: type) -> Any:
        """The method of a part; of a class the description, which ``help`` shows."""
        del owner
        return self._build if part is None else _method(self._build, part, part._client.send)  # noqa: SLF001 -- a method of the part


class lists(Generic[P, W]):  # noqa: N801 -- used as a decorator
    """A list, fetched page by page while it is iterated over."""

    def __init__(self, build: Callable[Concatenate[Any, P], Call[api.Page[W]]]) -> None:
        self._build = build

    @overload
    def __get__(self, part: None, owner: type) -> Callable[Concatenate[Any, P], Call[api.Page[W]]]: ...
    @overload
    def __get__(self, part: Part, owner: type) -> Callable[P, Iterator[W]]: ...
    @overload
    def __get__(self, part: AsyncPart, owner: type) -> Callable[P, AsyncIterator[W]]: ...
    def __get__(self, part: Part | AsyncPart | None, owner: type) -> Any:
        """The method of a part; of a class the description, which ``help`` shows."""
        del owner
        return self._build if part is None else _method(self._build, part, part._client.every)  # noqa: SLF001 -- a method of the part


def _method(build: Callable[..., Call[Any]], part: Part | AsyncPart, send: Callable[[Call[Any]], Any]) -> Callable[..., Any]:
    bound = functools.partial(build, part)

    @functools.wraps(build)
    def method(*given: Any, **named: Any) -> Any:
        return send(bound(*given, **named))

    method.__wrapped__ = build.__get__(part)  # or its signature would ask for self
    return method

"""Lists of the native API: pages by cursor, never more than MAX_PAGE at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, Query

from preftune.app.jobs.platform import Platform
from preftune.core.api import MAX_PAGE, Page, Word
from preftune.server.errors import ApiError
from preftune.store.base import Query as Asked
from preftune.store.base import R

T = TypeVar("T", bound=Word)


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a list: behind which record, how many, in which order."""

    after: str | None
    limit: int
    is_newest_first: bool


def part(
    after: Annotated[str | None, Query(max_length=128, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    order: Annotated[Literal["desc", "asc"], Query(description="desc: newest first.")] = "desc",
) -> Part:
    """The query parameters of every list."""
    return Part(after, limit, order == "desc")


PartOf = Annotated[Part, Depends(part)]


def page_of(
    platform: Platform, kind: type[R], asked: Part, project: str | None, show: Callable[[R], T], *,
    where: Mapping[str, Any] | None = None, metadata: Mapping[str, str] | None = None,
) -> Page[T]:  # fmt: skip
    """A page of a project's records as the API shows them.

    Raises
        ApiError: 400, ``after`` names no record of the list.
    """
    if asked.after is not None and platform.store.get(kind, asked.after, project, with_deleted=True) is None:
        raise ApiError(400, "after: the list has no such record; send `next` of the page before, or leave it out", param="after")
    wanted = {key: value for key, value in (where or {}).items() if value is not None}
    query = Asked(project, wanted, asked.after, asked.limit, asked.is_newest_first, metadata=metadata or {})
    found = platform.store.page(kind, query)
    rows = tuple(show(one) for one in found.items)
    return Page(data=rows, has_more=found.has_more, next=found.items[-1].id if found.has_more else None)

"""What a format is, and how the format of a file is recognised by its content.

A format is chosen once a file, by the shape of its first rows, and named in the report; a row that does not fit it is
a bad row. Nothing is guessed row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from preftune.core.errors import InputError
from preftune.core.records import Example, Provenance
from preftune.core.registry import Registry

Row: TypeAlias = Mapping[str, Any]
Style: TypeAlias = Literal["chat", "text"]

ROWS_LOOKED_AT = 100


class Format(Protocol):
    """Reads one schema. ``style`` forces raw text or chat where the schema leaves it open."""

    @property
    def style(self) -> Style | None:
        """``text`` or ``chat`` where the user forced one."""

    def matches(self, row: Row) -> bool:
        """Whether the row has the fields of this format; says nothing of their content."""

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The example in a row; raises ``BadRow`` with the field at fault."""


formats: Registry[Format] = Registry("format", "preftune.data.formats", "preftune.formats")


def has(row: Row, *fields: str) -> bool:
    """Whether a row has all these fields, with something in them."""
    return all(row.get(field) is not None for field in fields)


def detect(rows: Sequence[Row], path: str) -> str:
    """The format that fits most of these rows; the first by name where two fit equally many.

    Raises
        InputError: no format fits any row; the message shows the fields of the first and the formats that there are.
    """
    fits = {name: sum(map(formats.build(name).matches, rows)) for name in formats.names()}
    best = max(fits, key=lambda name: fits[name])
    if not fits[best]:
        fields = ", ".join(str(key)[:40] for key in list(rows[0])[:12]) or "none"
        raise InputError(
            f"{path}: no known format has the fields of the first row ({fields}); there is {', '.join(formats.names())}"
        )
    return best

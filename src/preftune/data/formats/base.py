"""What a format is, and how the format of a file is recognised by its content.

A format is chosen once a file, by the shape of its first rows, and named in the report; a row that does not fit it is
a bad row. Nothing is guessed row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from preftune.core.errors import BadRow, InputError, PreftuneError
from preftune.core.records import Example, Provenance
from preftune.core.registry import Registry

Row: TypeAlias = Mapping[str, Any]
Style: TypeAlias = Literal["chat", "text"]

ROWS_LOOKED_AT = 100


Parsed: TypeAlias = "Example | Sequence[Example | BadRow]"
"""What a row holds: one example; or several, in formats whose row is a tree or a set, with what is bad among them."""


class Format(Protocol):
    """Reads one schema. ``style`` forces raw text or chat where the schema leaves it open.

    A format that can also be written has ``write(example) -> row``, which raises ``CannotHold`` for what its schema has no
    place for.
    """

    @property
    def style(self) -> Style | None:
        """``text`` or ``chat`` where the user forced one."""

    def matches(self, row: Row) -> bool:
        """Whether the row has the fields of this format; says nothing of their content."""

    def read(self, row: Row, provenance: Provenance) -> Parsed:
        """The example or examples in a row; raises ``BadRow`` with the field at fault."""


@runtime_checkable
class WritableFormat(Protocol):
    """A format that examples are converted to."""

    def write(self, example: Example) -> dict[str, Any]:
        """The row of an example; CannotHold where the schema has no place for it."""


class CannotHold(PreftuneError):
    """An example that a format has no place for.

    Parameters
        reason: a short stable slug that is counted. detail: one sentence.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


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


def writable_formats() -> list[str]:
    """Names of the formats that examples can be converted to."""
    return [name for name in formats.names() if hasattr(formats.factory(name), "write")]

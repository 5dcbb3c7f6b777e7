"""The tables, made from the records: what lists are narrowed by are columns, the rest is one JSON column.

A migration writes them down explicitly; a test compares the two.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Column, DateTime, Index, Integer, MetaData, Table, Text, UniqueConstraint
from sqlalchemy.dialects.postgresql import JSONB

from preftune.store.records import KINDS, UNIQUE, Record

metadata = MetaData()
_NUMBER = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts up only in a column of its own integer type
_BODY = JSON().with_variant(JSONB(), "postgresql")
_JOB_COLUMNS = ("priority", "slots", "attempt", "max_attempts", "beat")
_INTEGERS = frozenset({"serial", "version", *_JOB_COLUMNS})


def columns_of(kind: type[Record]) -> tuple[str, ...]:
    """The fields of a record that have a column of their own."""
    own = set(kind.filters) | {name for fields in UNIQUE.get(kind.kind, ()) for name in fields}
    if kind.kind == "jobs":
        own |= set(_JOB_COLUMNS)
    if "deleted_at" in kind.model_fields:
        own.add("deleted_at")
    return tuple(sorted(own - {"id", "number", "project", "created_at"}))


def _table(kind: type[Record]) -> Table:
    columns: list[Any] = [
        Column("number", _NUMBER, primary_key=True, autoincrement=True),
        Column("id", Text(), nullable=False, unique=True),
        Column("project", Text(), nullable=False),
        Column("created_at", DateTime(timezone=True), nullable=False),
    ]
    for name in columns_of(kind):
        if name == "deleted_at":
            columns.append(Column(name, DateTime(timezone=True)))
        elif name in _INTEGERS:
            columns.append(Column(name, Integer(), nullable=False))
        else:
            columns.append(Column(name, Text(), nullable=name == "idempotency"))
    constraints: list[Any] = [
        UniqueConstraint(*fields, name=f"uq_{kind.kind}_{'_'.join(fields)}") for fields in UNIQUE.get(kind.kind, ())
    ]
    indexes = [Index(f"ix_{kind.kind}_project", "project", "number")]
    indexes += [Index(f"ix_{kind.kind}_{name}", name, "number") for name in sorted(kind.filters)]
    return Table(
        kind.kind, metadata, *columns, Column("body", _BODY, nullable=False), *constraints, *indexes, sqlite_autoincrement=True
    )


tables: dict[str, Table] = {kind.kind: _table(kind) for kind in KINDS}

"""The first tables."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

INTEGERS = {"attempt", "beat", "max_attempts", "priority", "serial", "slots", "version"}
TABLES: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...], tuple[str, ...]]] = {
    # name: (columns, what is unique together, what lists are narrowed by)
    "aliases": (("model", "name"), (("project", "name"),), ("model", "name")),
    "audit": (("action", "actor"), (), ("action", "actor")),
    "captures": (("model", "request"), (), ("model", "request")),
    "datasets": (("digest", "name", "version"), (("project", "name", "version"),), ("digest", "name")),
    "events": (("level", "subject", "type"), (), ("level", "subject", "type")),
    "files": (("deleted_at", "purpose", "sha256", "status"), (), ("purpose", "sha256", "status")),
    "jobs": (
        (
            "attempt",
            "beat",
            "deleted_at",
            "dialect",
            "idempotency",
            "max_attempts",
            "name",
            "priority",
            "slots",
            "status",
            "work",
            "worker",
        ),
        (("project", "idempotency"),),
        ("dialect", "idempotency", "name", "status", "work", "worker"),
    ),
    "keys": (("digest",), (("digest",),), ("digest",)),
    "models": (
        ("deleted_at", "digest", "form", "job", "name", "version"),
        (("project", "name", "version"),),
        ("digest", "form", "job", "name"),
    ),
    "projects": (("name", "serial"), (("name",), ("serial",)), ("name", "serial")),
    "resources": (("deleted_at", "name", "type"), (), ("name", "type")),
    "secrets": (("name",), (("project", "name"),), ("name",)),
    "uploads": (("file", "status"), (), ("file", "status")),
    "webhooks": ((), (), ()),
}


def upgrade() -> None:
    """Make every table: number, id, project and time, the columns of its own, and the rest of the record as JSON."""
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    body = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
    for name, (columns, unique, filters) in TABLES.items():
        op.create_table(
            name,
            sa.Column("number", number, primary_key=True, autoincrement=True),
            sa.Column("id", sa.Text(), nullable=False, unique=True),
            sa.Column("project", sa.Text(), nullable=False),
            sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
            *(_column(column) for column in columns),
            sa.Column("body", body, nullable=False),
            *(sa.UniqueConstraint(*fields, name=f"uq_{name}_{'_'.join(fields)}") for fields in unique),
            sqlite_autoincrement=True,
        )
        for column in ("project", *filters):
            op.create_index(f"ix_{name}_{column}", name, [column, "number"])


def downgrade() -> None:
    """Drop every table."""
    for name in TABLES:
        op.drop_table(name)


def _column(name: str) -> sa.Column[object]:
    if name == "deleted_at":
        return sa.Column(name, sa.DateTime(timezone=True))
    if name in INTEGERS:
        return sa.Column(name, sa.Integer(), nullable=False)
    return sa.Column(name, sa.Text(), nullable=name == "idempotency")

"""Bring a database's tables up to date; safe when several processes start at once."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from preftune.core.errors import InputError

MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 7_230_113  # any number that nobody else takes in this database


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Run the migrations that a database lacks, in one transaction.

    Raises
        InputError: the database was written by a newer preftune.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK})
        current = MigrationContext.configure(connection).get_current_revision()
        if current == script.get_current_head() and revision == "head":
            return
        if current is not None and current not in {one.revision for one in script.walk_revisions()}:
            raise InputError(f"the database is of a newer version (revision {current}); install the preftune that wrote it")
        config.attributes["connection"] = connection
        command.upgrade(config, revision)

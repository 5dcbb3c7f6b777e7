"""``preftune restore``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import print_result

EPILOG = """\b
Examples:
  PREFTUNE_HOME=/srv/preftune preftune restore /backups/preftune-2026-11-25.tar
  PREFTUNE_DATABASE=postgresql://db/new preftune restore state.tar

The database and PREFTUNE_HOME must be new. A backup of SQLite may be restored into PostgreSQL, and the other way round."""


@click.command("restore", epilog=EPILOG)
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(path: Path, is_json: bool) -> int:
    """Bring a server back from a backup; every byte is checked against its digest."""
    from preftune.app.backup import restore
    from preftune.app.jobs.platform import Platform

    store, artifacts, home = Platform.places()
    try:
        print_result(restore(path, store, artifacts, home), is_json=is_json)
    finally:
        store.close()
    return 0

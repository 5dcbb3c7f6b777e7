"""``preftune backup``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import print_result

EPILOG = """\b
Examples:
  preftune backup /backups/preftune-$(date +%F).tar
  PREFTUNE_DATABASE=postgresql://db/preftune preftune backup state.tar --json

Server and workers may go on meanwhile. Keep secret.key of PREFTUNE_HOME elsewhere: it is not inside."""


@click.command("backup", epilog=EPILOG)
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(path: Path, is_json: bool) -> int:
    """Write the whole state of a server to one file: records, files, jobs with their checkpoints and models."""
    from preftune.app.backup import backup
    from preftune.app.jobs.platform import Platform

    platform = Platform.open()
    try:
        print_result(backup(platform, path), is_json=is_json)
    finally:
        platform.store.close()
    return 0

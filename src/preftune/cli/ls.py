"""``preftune ls``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.installation import typed_server
from preftune.cli.output import print_json

STORED = ("jobs", "models", "files")
KINDS = ("runs", *STORED, "losses", "formats", "sources", "judges", "recipes")

MOST = 1000
SHOWN = {
    "jobs": ("id", "status", "work", "model", "name", "created_at"),
    "models": ("id", "name", "version", "form", "step", "created_at"),
    "files": ("id", "status", "filename", "purpose", "num_rows", "format", "created_at"),
}

EPILOG = """\b
Examples:
  preftune ls runs
  preftune ls losses --json
  preftune --server https://tune.example.org ls jobs
  preftune ls recipes"""


@click.command("ls", epilog=EPILOG)
@click.argument("kind", type=click.Choice(KINDS), default="runs")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True, help="Where runs are."
)
@click.option("--json", "is_json", is_flag=True, help="Print the list as JSON.")
def command(kind: str, output: Path, is_json: bool) -> int:
    """List runs (the default), jobs, models or files of an installation, losses, formats, sources, judges or preset recipes."""
    if kind in STORED:
        return _list_stored(kind, is_json)
    if kind == "runs" and typed_server():
        raise click.UsageError("runs are folders of this machine; of a server, name jobs, models or files")
    from preftune.app.show import list_kind

    rows = list_kind(kind, output)
    if is_json:
        print_json(rows)
        return 0
    for row in rows:
        click.echo("  ".join(str(value) for value in row.values() if value is not None))
    if not rows:
        click.echo(f"no {kind} in {output}; `preftune demo` makes one", err=True)
    return 0


def _list_stored(kind: str, is_json: bool) -> int:
    from itertools import islice

    from preftune.cli.installation import opened

    with opened() as installation:
        every = {"jobs": installation.jobs, "models": installation.models, "files": installation.files}[kind]()
        rows = list(islice(every, MOST))
    if is_json:
        print_json([row.model_dump(mode="json") for row in rows])
        return 0
    for row in rows:
        values = row.model_dump(mode="json")
        click.echo("  ".join(str(values[key]) for key in SHOWN[kind] if values[key] is not None))
    if not rows:
        click.echo(f"no {kind} yet", err=True)
    elif len(rows) == MOST:
        click.echo(f"the newest {MOST} {kind}; the API lists all of them", err=True)
    return 0

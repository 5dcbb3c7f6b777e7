"""``preftune ls``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import print_json

KINDS = ("runs", "losses", "formats", "sources", "judges", "recipes")

EPILOG = """\b
Examples:
  preftune ls runs
  preftune ls losses --json
  preftune ls recipes"""


@click.command("ls", epilog=EPILOG)
@click.argument("kind", type=click.Choice(KINDS), default="runs")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True, help="Where runs are."
)
@click.option("--json", "is_json", is_flag=True, help="Print the list as JSON.")
def command(kind: str, output: Path, is_json: bool) -> int:
    """List runs (the default), losses, formats, sources, judges or preset recipes."""
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

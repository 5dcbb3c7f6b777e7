"""``preftune check``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.installation import typed_server
from preftune.cli.output import print_json

SHOWN_ROWS = 50

EPILOG = """\b
Examples:
  preftune check pairs.jsonl
  preftune check train.jsonl.gz more.parquet --json
  preftune --server https://tune.example.org check train.jsonl
  preftune check odd.csv --format alpaca-preference
  preftune check votes.csv --columns prompt=question,first=a,second=b,label=who --labels 1=first,2=second,0=tie

Exit code 0 when every row is good, 1 when a row is bad."""


@click.command("check", epilog=EPILOG)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "format_name", help="Name the format instead of detecting it; `preftune ls formats` lists them.")
@click.option("--columns", metavar="FIELD=COLUMN,...", help="Which column holds what, for a file of no known format.")
@click.option("--labels", metavar="VALUE=LABEL,...", help="What the label column's values mean: first, second, tie, true, false.")
@click.option("--all", "show_all", is_flag=True, help=f"Print every bad row, not only the first {SHOWN_ROWS}.")
@click.option("--json", "is_json", is_flag=True, help="Print the report as JSON.")
def command(
    files: tuple[Path, ...], format_name: str | None, columns: str | None, labels: str | None, show_all: bool, is_json: bool
) -> int:
    """Validate data files: every bad row with its line, field, reason and an excerpt. On a server: upload them, too."""
    address = typed_server()
    if address is not None:
        from preftune.cli.remote_data import check_there

        if format_name or columns or labels:
            raise click.UsageError("a server detects the format; bring the file to a known one with `preftune convert` first")
        return check_there(address, files, shown=None if show_all else SHOWN_ROWS, is_json=is_json)
    from preftune.app.check import check

    report = check([str(file) for file in files], format_name, columns=columns, labels=labels)
    if is_json:
        print_json(report.to_dict())
        return report.exit_code
    rows = report.bad_rows if show_all else report.bad_rows[:SHOWN_ROWS]
    for row in rows:
        where = f"{row.file}:{row.line}"
        field = f" field {row.field!r}" if row.field else ""
        excerpt = f"  | {row.excerpt}" if row.excerpt else ""
        click.echo(f"{where}{field} {row.reason}: {row.detail}{excerpt}")
    if report.num_bad > len(rows):
        click.echo(f"... and {report.num_bad - len(rows)} more bad rows; --all prints up to 10,000")
    for line in report.summary():
        click.echo(line)
    return report.exit_code

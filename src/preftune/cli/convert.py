"""``preftune convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from preftune.cli.output import print_json, say

SHOWN_ROWS = 20

EPILOG = """\b
Examples:
  preftune convert hh.jsonl.gz --to trl-preference --out pairs.jsonl
  preftune convert votes.csv --columns prompt=question,first=a,second=b,label=who --labels 1=first,2=second,0=tie --to comparison
  preftune convert pairs.jsonl --to openai-preference --style chat --out - | head -1

Exit code 0 when every row was written, 1 when a row was left out."""


@click.command("convert", epilog=EPILOG)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, metavar="FORMAT", help="The format to write; a wrong name lists them.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write, - for stdout; FORMAT.jsonl by default.")
@click.option("--format", "format", help="Name the format that is read instead of detecting it.")
@click.option("--style", type=click.Choice(["chat", "text"]), help="Read texts as turns of a conversation, or as raw text.")
@click.option("--columns", metavar="FIELD=COLUMN,...", help="Which column holds what, for a file of no known format.")
@click.option("--labels", metavar="VALUE=LABEL,...", help="What the label column's values mean: first, second, tie, true, false.")
@click.option(
    "--rankings", type=click.Choice(["best_worst", "all", "adjacent"]), default="best_worst", show_default=True,
    help="Which pairs a ranking gives.",
)  # fmt: skip
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(files: tuple[Path, ...], target: str, out: Path | None, is_json: bool, **how: Any) -> int:
    """Convert data files between formats; rows that the target has no place for are counted and named."""
    from preftune.app.convert import HowToRead, convert

    done = convert([str(file) for file in files], target, out or Path(f"{target}.jsonl"), HowToRead(**how))
    if is_json and str(out) != "-":
        print_json(done.to_dict())
        return done.exit_code
    for row in done.rows[:SHOWN_ROWS]:
        say(f"{row.file}:{row.line} {row.reason}: {row.detail}")
    if len(done.rows) > SHOWN_ROWS:
        say(f"... and {len(done.rows) - SHOWN_ROWS} more rows; --json names up to 1,000")
    for line in done.summary():
        say(line)
    return done.exit_code

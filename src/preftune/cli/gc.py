"""``preftune gc``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import print_result

EPILOG = """\b
Examples:
  preftune gc
  preftune gc --reference-gb 20 --json
  preftune gc --yes

Of an installation (`preftune serve`) also the folders of deleted jobs and artifacts that no record names.
Never touched: final models, reports, the newest checkpoint of a run that can be resumed, what a running process holds,
jobs that run or may be retried, models that were not deleted."""


@click.command("gc", epilog=EPILOG)
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True, help="Where runs are."
)
@click.option("--days", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Age of caches that may go.")
@click.option("--reference-gb", type=click.FloatRange(min=0), help="Shrink the reference cache to this, oldest first.")
@click.option("--yes", is_flag=True, help="Delete; without it only say what would go.")
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(output: Path, days: float, reference_gb: float | None, yes: bool, is_json: bool) -> int:
    """Give disk space back: leftovers of crashes, old checkpoints of unfinished runs, old caches, deleted jobs."""
    import logging

    from preftune.app.gc import Policy, collect

    logging.getLogger("alembic").setLevel(logging.WARNING)
    result = collect(output, Policy(days, reference_gb), is_deleting=yes)
    print_result(result, is_json=is_json)
    return 0

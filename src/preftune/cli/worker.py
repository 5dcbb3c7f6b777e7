"""``preftune worker``."""

from __future__ import annotations

import logging

import click

EPILOG = """\b
Examples:
  preftune worker
  PREFTUNE_DATABASE=postgresql://db/preftune preftune worker --slots 2"""


@click.command("worker", epilog=EPILOG)
@click.option("--slots", default=1, show_default=True, help="Jobs that it runs at once.")
def command(slots: int) -> int:
    """Run queued jobs until stopped; SIGTERM checkpoints what runs and leaves it to the next worker."""
    from preftune.app.jobs.platform import Platform
    from preftune.app.serve import work

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    work(Platform.open(), slots=slots)
    return 0

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
@click.option(
    "--lease", default=30.0, show_default=True, type=click.FloatRange(1, 3600), metavar="SECONDS",
    help="A worker that is silent for so long has lost its jobs; the same for all workers.",
)  # fmt: skip
def command(slots: int, lease: float) -> int:
    """Run queued jobs until stopped; SIGTERM checkpoints what runs and leaves it to the next worker."""
    from preftune.app.jobs.platform import Platform
    from preftune.app.serve import work
    from preftune.core.addresses import limit_addresses

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every opening
    limit_addresses(())
    work(Platform.open(), slots=slots, lease=lease)
    return 0

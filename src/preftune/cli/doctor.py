"""``preftune doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import print_result

EPILOG = """\b
Examples:
  preftune doctor
  preftune doctor --json
  preftune doctor --hub

Exit code 1 when something would stop a run. Nothing leaves the machine without --hub."""


@click.command("doctor", epilog=EPILOG)
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True, help="Where runs go."
)
@click.option("--hub", is_flag=True, help="Also ask the model hub whether it answers.")
@click.option("--json", "is_json", is_flag=True, help="Print the checks as JSON.")
def command(output: Path, hub: bool, is_json: bool) -> int:
    """Look at versions, processor, memory, disk, GPU, packages and folders."""
    from preftune.app.doctor import diagnose

    result = diagnose(output, asks_hub=hub)
    print_result(result, is_json=is_json)
    return 1 if result.problems else 0

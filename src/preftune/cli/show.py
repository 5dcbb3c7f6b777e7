"""``preftune show``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import print_result

EPILOG = """\b
Examples:
  preftune show runs/recipe-20260101-120000-ab12
  preftune show RUN --json
  preftune show RUN --suspects --top 10"""


@click.command("show", epilog=EPILOG)
@click.argument("run")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True, help="Where runs are."
)
@click.option("--suspects", is_flag=True, help="List the training pairs whose label goes most against the others.")
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, help="How many suspects.")
@click.option("--json", "is_json", is_flag=True, help="Print everything as JSON.")
def command(run: str, output: Path, suspects: bool, top: int, is_json: bool) -> int:
    """Show one run: its stages, metrics, verdict and files; or the pairs that are most likely mislabelled."""
    if suspects:
        from preftune.app.suspects import find_suspects

        print_result(find_suspects(run, output, top), is_json=is_json)
        return 0
    from preftune.app.show import show_run

    shown = show_run(run, output)
    print_result(shown, is_json=is_json)
    return 0

"""``preftune show``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.installation import server, typed_server
from preftune.cli.output import print_json, print_result

EPILOG = """\b
Examples:
  preftune show runs/recipe-20260101-120000-ab12
  preftune show RUN --json
  preftune show ft-0f8e6d3a-1b2c-4d5e-8f90-a1b2c3d4e5f6
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
    """Show one run or job: its stages, metrics, verdict and files; or the pairs that are most likely mislabelled."""
    if not suspects and (run.startswith("ft-") or server()):
        from preftune.cli.installation import job_lines, opened

        with opened() as installation:
            job = installation.job(run)
        if is_json:
            print_json(job.model_dump(mode="json"))
        else:
            click.echo("\n".join(job_lines(job)))
        return 0
    if suspects and typed_server():
        raise click.UsageError("suspects are found in a run's folder, on the machine that trained it; leave --server out there")
    if suspects:
        from preftune.app.suspects import find_suspects

        print_result(find_suspects(run, output, top), is_json=is_json)
        return 0
    from preftune.app.show import show_run

    shown = show_run(run, output)
    print_result(shown, is_json=is_json)
    return 0

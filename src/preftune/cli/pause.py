"""``preftune pause``."""

from __future__ import annotations

import click

from preftune.cli.output import print_json

EPILOG = """\b
Examples:
  preftune pause ft-0f8e6d3a-1b2c-4d5e-8f90-a1b2c3d4e5f6
  preftune --server https://tune.example.org pause ft-0f8e6d3a-1b2c-4d5e-8f90-a1b2c3d4e5f6"""


@click.command("pause", epilog=EPILOG)
@click.argument("job_id", metavar="JOB")
@click.option("--json", "is_json", is_flag=True, help="Print the job as JSON.")
def command(job_id: str, is_json: bool) -> int:
    """Pause a job; it keeps its checkpoint and waits until it is resumed."""
    from preftune.cli.installation import opened

    with opened() as installation:
        job = installation.act(job_id, "pause")
    if is_json:
        print_json(job.model_dump(mode="json"))
    else:
        click.echo(f"{job.id}  {job.status}{f', asked to {job.asked}' if job.asked else ''}")
    return 0

"""``preftune logs``."""

from __future__ import annotations

import json

import click

from preftune.cli.output import clean

EPILOG = """\b
Examples:
  preftune logs ft-0f8e6d3a-1b2c-4d5e-8f90-a1b2c3d4e5f6 --follow
  preftune logs ft-0f8e6d3a-1b2c-4d5e-8f90-a1b2c3d4e5f6 --process
  preftune --server https://tune.example.org logs ft-0f8e6d3a-1b2c-4d5e-8f90-a1b2c3d4e5f6 --json"""


@click.command("logs", epilog=EPILOG)
@click.argument("job_id", metavar="JOB")
@click.option("--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("--process", "is_process", is_flag=True, help="What the job's process printed, instead of its events.")
@click.option("--json", "is_json", is_flag=True, help="One event a line, as JSON.")
def command(job_id: str, follow: bool, is_process: bool, is_json: bool) -> int:
    """What happened to a job: its events, oldest first."""
    from preftune.cli.installation import event_line, opened

    if is_process and (follow or is_json):
        raise click.UsageError("--process prints text that is there; leave --follow and --json out")
    with opened() as installation:
        if is_process:
            for text in installation.logs(job_id):
                click.echo(text, nl=False)
            return 0
        for event in installation.events(job_id, follow=follow):
            click.echo(json.dumps(clean(event.model_dump(mode="json"))) if is_json else event_line(event))
    return 0

"""``preftune train``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.installation import server
from preftune.cli.output import ProgressPrinter, print_json, print_result, say
from preftune.cli.probing import probe_mode, probe_option
from preftune.core.events import ignore
from preftune.core.launch import Launch

EPILOG = """\b
Examples:
  preftune train recipe.yaml
  preftune train recipe.yaml beta=0.2 lr=1e-5 output=runs
  preftune train recipe.yaml --dry-run
  preftune train recipe.yaml --no-probe
  preftune --server https://tune.example.org train recipe.yaml
  preftune train --resume runs/recipe-20260101-120000-ab12
  torchrun --nproc-per-node 8 -m preftune train recipe.yaml

SIGINT and SIGTERM write a checkpoint first; --resume goes on from it, bit for bit on a CPU."""


@click.command("train", epilog=EPILOG)
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", metavar="RUN", help="Go on with a run that was stopped: its folder or name.")
@click.option("--dry-run", is_flag=True, help="Plan only; train nothing.")
@probe_option
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(
    recipe: Path | None, overrides: tuple[str, ...], resume: str | None, dry_run: bool, probe: bool | None, is_json: bool
) -> int:
    """Train every stage of a recipe; each starts from, and is anchored to, the one before."""
    address = server()
    if address is not None:
        is_local = resume is not None or dry_run or probe is True
        return _train_there(address, recipe, overrides, is_local=is_local, no_probe=probe is False, is_json=is_json)
    from preftune.app.plan import plan
    from preftune.app.recipes import load_recipe
    from preftune.app.train import prepare_process, resume_run, train

    prepare_process()
    launch = Launch.from_environment()
    sink = ProgressPrinter() if launch.is_first else ignore
    if resume is not None:
        if recipe is not None:
            raise click.UsageError("give a recipe or --resume RUN, not both: a run holds its own recipe")
        if probe:
            raise click.UsageError("--probe rehearses a run before it begins; --resume goes on with one")
        result = resume_run(resume, sink=sink, no_probe=probe is False)
    else:
        if recipe is None:
            raise click.UsageError("name a recipe file, or --resume RUN")
        loaded = load_recipe(recipe, overrides)
        if dry_run:
            made = plan(loaded, probe=probe_mode(probe, "small"))
            if launch.is_first:
                print_result(made, is_json=is_json)
            made.refuse()
            return 0
        result = train(loaded, sink=sink, probe=probe_mode(probe, "worthwhile"))
    if not launch.is_first:
        return 0
    if is_json:
        print_json(result.to_dict())
    else:
        click.echo(str(result.model))
        say(f"run {result.run}; `preftune eval {result.run}` proves what it is worth, `preftune show {result.run}` shows it")
    return 0


def _train_there(
    address: str, recipe: Path | None, overrides: tuple[str, ...], *, is_local: bool, no_probe: bool, is_json: bool
) -> int:
    from preftune.cli.remote_train import train_there

    if recipe is None or is_local:
        raise click.UsageError("on a server, name a recipe file; --resume, --dry-run and --probe are for runs of this machine")
    job = train_there(address, recipe, overrides, no_probe=no_probe)
    if is_json:
        print_json(job.model_dump(mode="json"))
    else:
        click.echo(job.name)
        say(f"job {job.id}; the server answers by the model's name {job.name}")
    return 0

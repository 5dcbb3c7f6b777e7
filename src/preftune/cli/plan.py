"""``preftune plan``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import ProgressPrinter, print_json, print_result
from preftune.cli.probing import probe_mode, probe_option
from preftune.core.errors import Blocked

EPILOG = """\b
Examples:
  preftune plan recipe.yaml
  preftune plan recipe.yaml beta=0.2 stages.1.lr=1e-4 --json
  preftune plan recipe.yaml --memory 2GB --fix --write smaller.yaml

The data are always checked. Models that are small enough for it also rehearse their largest packs in a process of its
own, for memory and time, and answer some prompts; results are kept, so a train that follows does not pay twice.
Exit code 1 when something would stop the run; each blocker names its way out."""


@click.command("plan", epilog=EPILOG)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@probe_option
@click.option("--memory", metavar="SIZE", help="Plan for this much memory, such as 2GB, instead of the machine's.")
@click.option("--fix", is_flag=True, help="Propose the setting that fits into memory, each step with its figure.")
@click.option("--write", type=click.Path(path_type=Path, dir_okay=False), help="With --fix: write the recipe that fits.")
@click.option("--json", "is_json", is_flag=True, help="Print the plan as JSON.")
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    probe: bool | None,
    memory: str | None,
    fix: bool,
    write: Path | None,
    is_json: bool,
) -> int:
    """Say what a recipe would do, and refuse what cannot work, before anything is trained."""
    from preftune.app.fix import propose, read_size
    from preftune.app.plan import plan
    from preftune.app.recipes import load_recipe
    from preftune.app.train import prepare_process

    prepare_process()
    limit = None if memory is None else read_size(memory)
    if write is not None and not fix:
        raise click.UsageError("--write FILE goes with --fix")
    loaded = load_recipe(recipe, overrides)
    if fix:
        proposal = propose(loaded, limit, write, sink=ProgressPrinter())
        print_result(proposal, is_json=is_json)
        return 0 if proposal.fits else 1
    made = plan(loaded, ProgressPrinter(), probe=probe_mode(probe, "small"), memory=limit)
    if is_json:
        print_json(made.to_dict())
        return 1 if made.blockers else 0
    for line in made.summary():
        click.echo(line)
    for finding in made.findings:
        if finding.level == "warning":
            click.echo(str(finding))
    if made.blockers:
        raise Blocked(made.blockers)
    click.echo("nothing stands in the way; `preftune run` plans, trains, evaluates and reports")
    return 0

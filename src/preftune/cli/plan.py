"""``preftune plan``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import print_json
from preftune.core.errors import Blocked

EPILOG = """\b
Examples:
  preftune plan recipe.yaml
  preftune plan recipe.yaml beta=0.2 stages.1.lr=1e-4 --json

Exit code 1 when something would stop the run; each blocker names its way out."""


@click.command("plan", epilog=EPILOG)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "is_json", is_flag=True, help="Print the plan as JSON.")
def command(recipe: Path, overrides: tuple[str, ...], is_json: bool) -> int:
    """Say what a recipe would do, and refuse what cannot work, before anything is trained."""
    from preftune.app.plan import plan
    from preftune.app.recipes import load_recipe

    made = plan(load_recipe(recipe, overrides))
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

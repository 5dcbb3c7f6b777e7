"""``preftune sweep``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import ProgressPrinter, print_result
from preftune.core.errors import UsageError

EPILOG = """\b
Examples:
  preftune sweep recipe.yaml --grid beta=0.01,0.03,0.1,0.3,1
  preftune sweep recipe.yaml --grid stages.1.lr=1e-5,1e-4 --grid beta=0.1,0.5 evaluation.limit=100
  preftune sweep --resume runs/sweep-recipe-20260101-120000-ab12"""


@click.command("sweep", epilog=EPILOG)
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--grid", "axes", multiple=True, metavar="KEY=V1,V2", help="Values of one key; several --grid make a grid.")
@click.option("--resume", metavar="SWEEP", help="Go on with a sweep that was stopped.")
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(recipe: Path | None, overrides: tuple[str, ...], axes: tuple[str, ...], resume: str | None, is_json: bool) -> int:
    """Train and evaluate a grid of settings on one cached reference; plot drift against win rate.

    Stages that all points share are trained once. Without --grid the recipe's own `sweep` section is used.
    """
    from preftune.app.sweep import resume_sweep, sweep
    from preftune.app.train import prepare_process

    if (recipe is None) == (resume is None):
        raise UsageError("name either a recipe or --resume SWEEP")
    prepare_process()
    if resume is not None:
        result = resume_sweep(resume, ProgressPrinter())
    else:
        assert recipe is not None
        result = sweep(recipe, axes, overrides, ProgressPrinter())
    print_result(result, is_json=is_json)
    return 0

"""``preftune run``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import ProgressPrinter, print_result
from preftune.cli.probing import probe_mode, probe_option

EPILOG = """\b
Examples:
  preftune run recipe.yaml
  preftune run recipe.yaml beta=0.05 evaluation.limit=100 --json"""


@click.command("run", epilog=EPILOG)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@probe_option
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(recipe: Path, overrides: tuple[str, ...], probe: bool | None, is_json: bool) -> int:
    """Plan, train every stage, evaluate on unseen prompts and write the report."""
    from preftune.app.recipes import load_recipe
    from preftune.app.run import run
    from preftune.app.train import prepare_process

    prepare_process()
    result = run(load_recipe(recipe, overrides), sink=ProgressPrinter(), probe=probe_mode(probe, "worthwhile"))
    print_result(result, is_json=is_json)
    return 0

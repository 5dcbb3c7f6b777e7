"""``preftune reference``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import ProgressPrinter, print_result

EPILOG = """\b
Examples:
  preftune reference recipe.yaml
  preftune reference recipe.yaml data.train=more.jsonl --json

Scores are kept by content: model, tokens, precision and kernel. Learning rate, beta, loss, seed, adapter rank and epochs
change nothing, so a sweep pays once. What an interrupted call has scored is kept; call again to go on."""


@click.command("reference", epilog=EPILOG)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(recipe: Path, overrides: tuple[str, ...], is_json: bool) -> int:
    """Score what a recipe's reference will be asked, and train nothing: hits, misses and size."""
    from preftune.app.recipes import load_recipe
    from preftune.app.reference import score_references
    from preftune.app.train import prepare_process

    prepare_process()
    print_result(score_references(load_recipe(recipe, overrides), ProgressPrinter()), is_json=is_json)
    return 0

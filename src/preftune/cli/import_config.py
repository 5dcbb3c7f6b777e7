"""``preftune import-config``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from preftune.cli.output import print_json, say

EPILOG = """\b
Examples:
  preftune import-config dpo_config.yaml --out recipe.yaml
  preftune import-config axolotl.yaml --devices 8 --data pairs.jsonl > recipe.yaml
  preftune import-config job.json --from together --model ./my-model --json

The recipe goes to stdout or --out; what could not be carried, and why, to stderr and into the recipe's comments."""


@click.command("import-config", epilog=EPILOG)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Recipe to write; stdout by default.")
@click.option(
    "--from", "source", metavar="SOURCE", help="trl, axolotl, llamafactory, together, openai, seekrflow; else recognised."
)
@click.option("--trainer", default="", help="Which trainer of TRL, where the file does not say: dpo, cpo, orpo, kto, sft.")
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Accelerators that the job ran on.")
@click.option("--model", help="The model to write instead of the job's.")
@click.option(
    "--data", multiple=True, type=click.Path(), help="The file of pairs to write instead of the job's; may be repeated."
)
@click.option("--json", "is_json", is_flag=True, help="Print recipe, what was carried and what was not as JSON.")
def command(file: Path, *, out: Path | None, is_json: bool, **answers: Any) -> int:
    """Turn a job of another system into a recipe, and say what could not be carried."""
    from preftune.app.import_config import Answers, import_config

    made = import_config(file, Answers(**answers), out)
    if is_json:
        print_json(made.to_dict())
        return 0
    for line in made.talk():
        say(line)
    if out is None:
        sys.stdout.write(made.to_yaml())
    return 0

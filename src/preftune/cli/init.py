"""``preftune init``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import print_result

EPILOG = """\b
Examples:
  preftune init first
  preftune init mine --from pairs.parquet --model ./my-sft-model
  preftune init mine --from ratings.jsonl --json

Never overwrites. With --from the format is recognised, some prompts are held out for the verdict, and the settings
follow what the rows are."""


@click.command("init", epilog=EPILOG)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path())
@click.option("--from", "source", type=click.Path(), help="Begin with your own pairs, labels or demonstrations.")
@click.option("--model", help="The model to name in the recipe. [default: starter]")
@click.option("--json", "is_json", is_flag=True, help="Print what was written as JSON.")
def command(folder: Path, source: str | None, model: str | None, is_json: bool) -> int:
    """Write a recipe, a small data set, verdict prompts and judges that run at once."""
    from preftune.app.init import init

    print_result(init(folder, source, model), is_json=is_json)
    return 0

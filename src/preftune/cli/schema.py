"""``preftune schema``."""

from __future__ import annotations

import click

from preftune.cli.output import print_json

KINDS = ("recipe", "judge", "example", "report")

EPILOG = """\b
Examples:
  preftune schema recipe > recipe.schema.json
  preftune schema judge

An editor that knows JSON Schema completes and checks a recipe with a first line such as
# yaml-language-server: $schema=recipe.schema.json"""


@click.command("schema", epilog=EPILOG)
@click.argument("kind", type=click.Choice(KINDS), default="recipe")
@click.option("--json", "is_json", is_flag=True, help="The output is JSON either way.")
def command(kind: str, is_json: bool) -> int:
    """Print the JSON Schema of a recipe (the default), a judge, an example or a report."""
    from preftune.app.schema import schema_of

    del is_json
    print_json(schema_of(kind))
    return 0

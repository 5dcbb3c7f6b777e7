"""``preftune label``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import ProgressPrinter, print_result

EPILOG = """\b
Examples:
  preftune label comparisons.jsonl --judge judge.yaml
  preftune label comparisons.jsonl --judge llm:qwen2.5:7b@http://localhost:11434/v1 --out labelled.jsonl
  preftune label pairs.jsonl --relabel --judge '{name: reward_model, model: FOLDER}' --json

Rows hold prompt, first and second. Each is judged in both orders and written as format comparison, with ties and confidence."""


@click.command("label", epilog=EPILOG)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--judge", required=True, help="Judge file, llm:MODEL@URL, or a judge written as {name: ..., ...}.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("labelled.jsonl"), show_default=True,
    help="File of comparisons.",
)  # fmt: skip
@click.option("--relabel", is_flag=True, help="Judge rows that have a label too, and replace it.")
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(file: Path, judge: str, out: Path, relabel: bool, is_json: bool) -> int:
    """Fill labels by a judge: which of two completions is better, asked in both orders."""
    import yaml

    from preftune.app.label import label_file

    spec = yaml.safe_load(judge) if judge.lstrip().startswith("{") else judge
    print_result(label_file(file, spec, out, relabel=relabel, sink=ProgressPrinter()), is_json=is_json)
    return 0

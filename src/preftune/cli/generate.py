"""``preftune generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from preftune.cli.output import ProgressPrinter, print_result

EPILOG = """\b
Examples:
  preftune generate starter --prompts prompts.jsonl --judge judge.yaml
  preftune generate runs/my-run --prompts prompts.jsonl --judge judge.yaml --samples 8 --out pairs.jsonl
  preftune generate starter --prompts prompts.jsonl --judge judge.yaml --verdict verdict.jsonl \\
      --pairing all guards.min_margin=1 decoding.temperature=0.9 --json

The record stands beside the pairs: every sample with its score, and a summary. The same command again goes on where
the last one stopped; with another pairing or other guards, samples and judgements are kept."""


@click.command("generate", epilog=EPILOG)
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--prompts", required=True, help="File of prompts, or of pairs, whose prompts are taken.")
@click.option("--judge", required=True, help="Judge file, or a judge written as {name: ..., ...}.")
@click.option("--samples", type=click.IntRange(2), default=4, show_default=True, help="Completions of each prompt.")
@click.option(
    "--pairing",
    type=click.Choice(["best_worst", "best_random", "all", "threshold"]),
    default="best_worst",
    show_default=True,
    help="Which samples become a pair.",
)
@click.option("--threshold", type=float, help="Least difference of scores, with --pairing threshold.")
@click.option("--limit", type=click.IntRange(1), help="Use this many prompts.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of every draw.")
@click.option("--verdict", type=click.Path(path_type=Path, dir_okay=False), help="Prompts that prove results; none is used.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("generated.jsonl"),
    show_default=True,
    help="File of pairs; the record is the folder NAME-record beside it.",
)
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True, help="Where runs are."
)
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str,
    overrides: tuple[str, ...],
    judge: str,
    out: Path,
    output: Path,
    verdict: Path | None,
    is_json: bool,
    **given: Any,
) -> int:
    """Make pairs: sample completions from a model, judge them, pair them by a stated rule with guards."""
    import yaml

    from preftune.app.generate import generate_pairs
    from preftune.app.train import prepare_process

    prepare_process()
    keys = {key: value for key, value in given.items() if value is not None}
    keys["judge"] = yaml.safe_load(judge) if judge.lstrip().startswith("{") else judge
    result = generate_pairs(model, keys, overrides, out=out, output=output, verdict=verdict, sink=ProgressPrinter())
    print_result(result, is_json=is_json)
    return 0

"""``preftune compare``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.installation import typed_server
from preftune.cli.output import ProgressPrinter, print_result

EPILOG = """\b
Examples:
  preftune compare runs/tuned-20260101-120000-ab12 starter --prompts prompts.jsonl --judge judge.yaml
  preftune compare ours.jsonl theirs.jsonl --judge llm:qwen2.5:7b@http://localhost:11434
  preftune compare RUN@40 RUN@80 --prompts prompts.jsonl --judge judge.yaml limit=100 decoding.temperature=0
  preftune --server https://tune.example.org compare starter-mine-1 starter --prompts prompts.jsonl --judge judge-7b

A file of completions has rows of prompt and completion, whatever model wrote them: a hosted model needs no weights here."""


@click.command("compare", epilog=EPILOG)
@click.argument("first")
@click.argument("second")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--judge", required=True, help="Judge file, or llm:MODEL@URL; on a server also a model of it.")
@click.option("--prompts", help="File of prompts; two files of completions bring their own.")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True, help="Where runs are."
)
@click.option("--json", "is_json", is_flag=True, help="Print the report as JSON.")
def command(
    first: str, second: str, overrides: tuple[str, ...], judge: str, prompts: str | None, output: Path, is_json: bool
) -> int:
    """Say how often the first model wins over the second: both orders, an interval, and at equal length."""
    address = typed_server()
    if address is not None:
        from preftune.cli.remote_data import compare_there

        return compare_there(address, (first, second), judge, prompts, overrides, is_json=is_json)
    from preftune.app.compare import compare
    from preftune.app.train import prepare_process

    prepare_process()
    result = compare(first, second, judge=judge, prompts=prompts, overrides=overrides, output=output, sink=ProgressPrinter())
    print_result(result, is_json=is_json)
    return 0

"""``preftune eval``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.installation import typed_server
from preftune.cli.output import ProgressPrinter, print_result

EPILOG = """\b
Examples:
  preftune eval runs/recipe-20260101-120000-ab12
  preftune eval RUN evaluation.prompts=prompts.jsonl evaluation.judge=judge.yaml
  preftune eval runs/RUN/stages/2-dpo/final --baseline runs/RUN/stages/1-sft/final \\
      evaluation.prompts=prompts.jsonl evaluation.judge=judge.yaml --json
  preftune --server https://tune.example.org eval starter-mine-1 evaluation.prompts=prompts.jsonl evaluation.judge=judge.yaml"""


@click.command("eval", epilog=EPILOG)
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--baseline", help="Compare against this run, step or folder instead of the model that the last stage started from."
)
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True, help="Where runs are."
)
@click.option("--json", "is_json", is_flag=True, help="Print the report as JSON.")
def command(model: str, overrides: tuple[str, ...], baseline: str | None, output: Path, is_json: bool) -> int:
    """Prove how much better a run got: win rate on unseen prompts with its interval, and held-out accuracy."""
    address = typed_server()
    if address is not None:
        from preftune.cli.remote_eval import eval_there

        return eval_there(address, model, baseline, overrides, is_json=is_json)
    from preftune.app.evaluate import evaluate_run
    from preftune.app.train import prepare_process

    prepare_process()
    result = evaluate_run(model, overrides, baseline=baseline, output=output, sink=ProgressPrinter())
    print_result(result, is_json=is_json)
    return 0

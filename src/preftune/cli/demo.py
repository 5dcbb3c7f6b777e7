"""``preftune demo``."""

from __future__ import annotations

from pathlib import Path

import click

from preftune.cli.output import ProgressPrinter, print_result

EPILOG = """\b
Examples:
  preftune demo
  preftune demo --output /tmp/demo --json

Trains on the package's own starter model and pairs: no download, no GPU, a few minutes on two cores."""


@click.command("demo", epilog=EPILOG)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Folder for the run.",
)
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
def command(output: Path, is_json: bool) -> int:
    """Align the embedded starter model: SFT, then DPO against its frozen copy, then the proof."""
    from preftune.app.demo import demo
    from preftune.app.train import prepare_process

    prepare_process()
    result = demo(output, sink=ProgressPrinter())
    print_result(result, is_json=is_json)
    return 0

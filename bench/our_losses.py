"""preftune with any loss on given rows, through the path that `preftune train` takes; writes one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune.core.events import Event, StepDone
from preftune.core.recipe import ModelConfig, StageConfig
from preftune.core.records import TokenisedExample
from preftune.modeling.load import load_model
from preftune.training.loop import run_stage
from preftune.training.state import StagePlan
from rows import rows_of


def as_kto(rows: list[TokenisedExample], batch: int) -> list[TokenisedExample]:
    """The chosen completion of every other row and the rejected one of those between, with TRL's partners.

    TRL takes as partner the completion of the row before, round in a circle within each micro-batch.
    """
    single = [replace(row, completions=(row.completions[at % 2],), labels=(at % 2 == 0,)) for at, row in enumerate(rows)]
    found = []
    for start in range(0, len(single), batch):
        part = single[start : start + batch]
        found += [replace(row, partner=part[at - 1].completions[0]) for at, row in enumerate(part)]
    return found


def ids_of(example: TokenisedExample) -> dict[str, Any]:
    """The ids as the peer's script names them."""
    found = {"prompt_ids": list(example.prompt_ids), "completion_ids": [list(one.ids) for one in example.completions]}
    return found if example.partner is None else found | {"partner_ids": list(example.partner.ids)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    loaded = load_model(ModelConfig(name=options.model), precision="float32")
    train = rows_of(options.train, loaded.tokenizer, 512)
    if options.method == "kto":
        train = as_kto(train, options.batch)
    config = StageConfig(
        name="parity",
        method=options.method,
        loss=json.loads(options.loss),
        adapter="full",
        max_steps=options.steps,
        pairs_per_step=options.batch,
        lr=options.lr,
        schedule="linear",
        warmup=0.1,
        shuffle=False,  # the file is in the order that both systems train in
        evals=0,
        checkpoints=0,
    )
    losses: list[dict[str, float]] = []

    def sink(event: Event, /) -> None:
        if isinstance(event, StepDone):
            losses.append(dict(event.metrics))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = StagePlan(
            config=config,
            loaded=loaded,
            train=train,
            select=[],
            folder=folder / "run",
            seed=options.seed,
            recipe_digest="parity",
            cache_folder=folder / "cache",
        )
        done = run_stage(plan, sink)
    return {
        "losses": [row["loss"] for row in losses],
        "metrics": losses,
        "ids": [ids_of(example) for example in train],
        "layout": done.facts.get("layout"),
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--method", required=True)
    made.add_argument("--model", required=True)
    made.add_argument("--train", required=True, help="JSONL of prompt, chosen, rejected")
    made.add_argument("--out", required=True)
    made.add_argument("--loss", default="{}", help="JSON of the loss's options")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--steps", type=int, required=True)
    made.add_argument("--lr", type=float, required=True)
    made.add_argument("--seed", type=int, default=0)
    return made


if __name__ == "__main__":
    options = parser().parse_args()
    Path(options.out).write_text(json.dumps(run(options)))
    sys.exit(0)

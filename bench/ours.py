"""preftune on given rows, through the path that `preftune train` takes; writes one JSON object. One run, one process."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `preftune train` does, before torch starts its threads

import torch

from preftune.core.events import Event, Progress, StageStarted, StepDone
from preftune.core.recipe import LoraConfig, ModelConfig, StageConfig
from preftune.modeling.load import load_model
from preftune.training.devices import set_allocator
from preftune.training.loop import run_stage
from preftune.training.state import StagePlan
from process import differences, peak_rss_bytes
from rows import ids_of, rows_of


class StepClock:
    """Sees every event; seconds of preparation (adapters, checks, the reference's scores) and of every step."""

    def __init__(self) -> None:
        self.times: list[float] = [time.perf_counter()]
        self.cpu: list[float] = []
        self.scored: list[float] = []
        self.losses: list[float] = []

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, Progress) and event.what == "scoring the reference":
            self.scored.append(time.perf_counter())
        if isinstance(event, StageStarted | StepDone):
            self.times.append(time.perf_counter())
            self.cpu.append(time.process_time())
        if isinstance(event, StepDone):
            self.losses.append(event.metrics["loss"])

    @property
    def reference_seconds(self) -> float:
        """Of scoring the reference: from the first pack's end to the last one's, and the first one at their mean."""
        between = differences(self.scored)
        return sum(between) * len(self.scored) / len(between) if between else 0.0


def run(options: argparse.Namespace) -> dict[str, Any]:
    imported = time.perf_counter()
    applied = set_allocator()  # as `preftune train` does; an allocator that the environment chose is left alone
    precision = "float32" if options.dtype == "float32" else "bfloat16"
    loaded = load_model(ModelConfig(name=options.model), precision=precision)  # type: ignore[arg-type]
    train = rows_of(options.train, loaded.tokenizer, options.max_length, "demonstrations" if options.method == "sft" else "pairs")
    if options.dump_ids:
        Path(options.dump_ids).write_text("".join(json.dumps(ids_of(example)) + "\n" for example in train))
    config = StageConfig(
        name="bench",
        method=options.method,
        loss={"beta": options.beta} if options.method == "dpo" else {},
        adapter="lora" if options.lora else "full",
        lora=LoraConfig(rank=options.lora or 16, alpha=2 * (options.lora or 16)),
        epochs=options.epochs,
        max_steps=options.steps,
        pairs_per_step=options.batch,
        tokens_per_pack=options.tokens_per_pack,
        lr=options.lr,
        schedule=options.schedule,
        warmup=options.warmup,
        shuffle=False,  # the file is in the order that both systems train in
        shared_prefix="off" if options.no_sharing else "auto",
        compile=options.compile,
        probe=None,  # which samples completions
        evals=0,
        checkpoints=0,
    )
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        plan = StagePlan(
            config=config,
            loaded=loaded,
            train=train,
            select=[],
            folder=Path(options.save or folder),
            seed=options.seed,
            recipe_digest="bench",
            cache_folder=Path(folder) / "cache",
        )
        ready = clock.times[0] = time.perf_counter()
        done = run_stage(plan, clock)
        trained = time.perf_counter()
    prepared, *steps = differences(clock.times)
    return {
        "system": "preftune",
        "versions": {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "rows": len(train),
        "allocator_set": applied,
        "build_seconds": ready - imported,  # loading and tokenising
        "prepare_seconds": prepared,  # adapters, checks at run start, every reference score of these rows
        "reference_seconds": clock.reference_seconds,
        "train_seconds": trained - ready,  # preparation, steps and the final save
        "step_seconds": steps,
        "step_cpu_seconds": differences(clock.cpu),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "reference_forwards": done.reference_forwards,
        "facts": {key: value for key, value in done.facts.items() if isinstance(value, str | int | float)},
        "losses": clock.losses,
        "final": str(done.final),
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--model", required=True)
    made.add_argument("--train", required=True, help="JSONL of prompt, chosen, rejected")
    made.add_argument("--out", required=True, help="where the JSON goes")
    made.add_argument("--method", choices=("dpo", "orpo", "sft"), default="dpo")
    made.add_argument("--batch", type=int, default=8, help="pairs per step")
    made.add_argument("--steps", type=int)
    made.add_argument("--epochs", type=float, default=1.0)
    made.add_argument("--lr", type=float, default=1e-6)
    made.add_argument("--beta", type=float, default=0.1)
    made.add_argument("--schedule", default="linear")
    made.add_argument("--warmup", type=float, default=0.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--lora", type=int, help="rank; full fine-tuning without")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    made.add_argument("--tokens-per-pack", type=int, default=2048)
    made.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    made.add_argument("--no-sharing", action="store_true", help="one row a completion")
    made.add_argument("--max-length", type=int, default=1024)
    made.add_argument("--dump-ids")
    made.add_argument("--save", help="run folder; the model is in its final/")
    return made


if __name__ == "__main__":
    options = parser().parse_args()
    Path(options.out).write_text(json.dumps(run(options)))
    sys.exit(0)

"""TRL's own trainers for the losses beside DPO, on given rows: IPO, SimPO, ORPO and KTO. Runs inside `.venv-trl`.

Nothing of TRL is changed but that each micro-batch's loss is recorded in full precision. Writes one JSON object: the loss of
every optimiser step, and the token ids that the trainer made.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # ORPO and CPO warn that they may move

import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from peer_trl import tokenizer_that_keeps_unknowns

Row = dict[str, Any]
TRAINERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "ipo": (DPOConfig, DPOTrainer, {"loss_type": "ipo", "disable_dropout": True}),
    "simpo": (CPOConfig, CPOTrainer, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "orpo": (ORPOConfig, ORPOTrainer, {}),
    "kto": (KTOConfig, KTOTrainer, {"loss_type": "kto"}),
}


def recording(base: type) -> type:
    """The trainer, with every micro-batch's loss kept."""

    class Recording(base):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.recorded.append(loss.item())
            return loss

    return Recording


def columns_of(method: str, rows: Sequence[Row]) -> list[Row]:
    """Pairs as they are; for KTO the chosen completion of every other row, and the rejected one of those between."""
    if method != "kto":
        return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    sides = ("chosen", "rejected")
    return [{"prompt": row["prompt"], "completion": row[sides[at % 2]], "label": at % 2 == 0} for at, row in enumerate(rows)]


def ids_of(method: str, row: Row) -> Row:
    """Token ids under the same names for every trainer."""
    if method == "kto":
        return {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": [row["completion_ids"]],
            "partner_ids": row["KL_completion_ids"],
        }
    if method == "ipo":
        return {"prompt_ids": row["prompt_ids"], "completion_ids": [row["chosen_ids"], row["rejected_ids"]]}
    count = len(row["prompt_input_ids"])
    return {
        "prompt_ids": row["prompt_input_ids"],
        "completion_ids": [row[f"{side}_input_ids"][count:] for side in ("chosen", "rejected")],
    }


def run(options: argparse.Namespace) -> Row:
    config, trainer, own = TRAINERS[options.method]
    rows = [json.loads(line) for line in Path(options.train).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.lr,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            seed=options.seed,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=512,
            max_steps=options.steps,
            **own,
            **json.loads(options.config),
        )
        made = recording(trainer)(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
            if options.method in {"simpo", "orpo"}
            else options.model,
            args=arguments,
            train_dataset=Dataset.from_list(columns_of(options.method, rows)),
            processing_class=tokenizer_that_keeps_unknowns(options.model),
        )
        made.recorded = []
        ids = [ids_of(options.method, row) for row in made.train_dataset]
        made.train()
    size = options.accumulate
    return {
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__},
        "losses": [sum(made.recorded[at : at + size]) / size for at in range(0, len(made.recorded), size)],
        "ids": ids,
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--method", required=True, choices=tuple(TRAINERS))
    made.add_argument("--model", required=True)
    made.add_argument("--train", required=True, help="JSONL of prompt, chosen, rejected")
    made.add_argument("--out", required=True)
    made.add_argument("--config", default="{}", help="JSON of the trainer's own options")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--accumulate", type=int, default=1)
    made.add_argument("--steps", type=int, required=True)
    made.add_argument("--lr", type=float, required=True)
    made.add_argument("--seed", type=int, default=0)
    return made


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    options = parser().parse_args()
    Path(options.out).write_text(json.dumps(run(options)))
    sys.exit(0)

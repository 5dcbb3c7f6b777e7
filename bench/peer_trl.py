"""TRL's DPOTrainer on given rows: the peer. Runs inside `.venv-trl` and writes one JSON object.

Nothing of TRL is changed: the driver keeps it off the hub and from sending telemetry (`measure.OFFLINE`), rows go in as a
`datasets.Dataset` of strings, options through `DPOConfig`, times come from a `TrainerCallback`. Only with `--losses` the
trainer is subclassed, to record each step's loss in full precision.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # ORPO warns that it may move

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from process import differences, peak_rss_bytes

CONFIGS = {"dpo": DPOConfig, "orpo": ORPOConfig, "sft": SFTConfig}
TRAINERS = {"dpo": DPOTrainer, "orpo": ORPOTrainer, "sft": SFTTrainer}
DTYPES = ("float32", "autocast", "bfloat16", "bfloat16-autocast")


class StepClock(TrainerCallback):
    """Seconds of every optimiser step, data loading included."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.on_step_end()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())


class RecordingTrainer(DPOTrainer):
    """DPOTrainer that keeps every micro-batch's loss."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.recorded.append(loss.item())  # type: ignore[attr-defined]
        return loss


def config_of(options: argparse.Namespace, folder: str) -> Any:
    """The peer's configuration; an option that is not given stays at TRL's own default."""
    given: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": options.lr,
        "lr_scheduler_type": options.schedule,
        "warmup_steps": options.warmup,
        "seed": options.seed,
        "train_sampling_strategy": "sequential",  # the file is in the order that both systems train in
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not options.cuda,
        "logging_steps": options.logging_steps,
    }
    if options.method == "dpo":
        given |= {"beta": options.beta, "precompute_ref_log_probs": options.precompute}
    if options.max_length:
        given["max_length"] = options.max_length
    if options.steps:
        given["max_steps"] = options.steps
    else:
        given["num_train_epochs"] = options.epochs
    if options.dtype == "float32":
        given["bf16"] = False
    elif options.dtype.startswith("bfloat16"):
        given["bf16"] = options.dtype == "bfloat16-autocast"
        if options.method != "orpo":  # which takes a loaded model here
            given["model_init_kwargs"] = {"dtype": "bfloat16"}
    if options.checkpointing is not None:
        given["gradient_checkpointing"] = options.checkpointing == "on"
    return CONFIGS[options.method](**given)


def columns_of(method: str, row: dict[str, Any]) -> dict[str, str]:
    """What a trainer reads of a row; SFT the chosen completion."""
    if method == "sft":
        return {"prompt": row["prompt"], "completion": row["chosen"]}
    return {key: row[key] for key in ("prompt", "chosen", "rejected")}


def model_of(options: argparse.Namespace) -> Any:
    """The model's folder, or the loaded model where the trainer wants one."""
    if options.method != "orpo":
        return options.model
    return AutoModelForCausalLM.from_pretrained(options.model, dtype="bfloat16" if "bfloat16" in options.dtype else "float32")


def tokenizer_that_keeps_unknowns(model: str) -> Any:
    """transformers 5 rebuilds some Llama tokenizers and loses the unknown token: give it back, as preftune does."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.model.unk_token = tokenizer.unk_token
    return tokenizer


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows = [json.loads(line) for line in Path(options.train).read_text().splitlines()]
    clock = StepClock()
    imported = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = (RecordingTrainer if options.losses else TRAINERS[options.method])(
            model=model_of(options),
            args=config_of(options, folder),
            train_dataset=Dataset.from_list([columns_of(options.method, row) for row in rows]),
            peft_config=LoraConfig(
                r=options.lora, lora_alpha=2 * options.lora, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            if options.lora
            else None,
            processing_class=tokenizer_that_keeps_unknowns(options.model) if options.keep_unknown else None,
            callbacks=[clock],
        )
        made.recorded = []
        built = time.perf_counter()
        if options.dump_ids:
            with Path(options.dump_ids).open("w") as file:
                columns = ("prompt_ids", "chosen_ids", "rejected_ids")
                columns = ("prompt_ids", "chosen_ids", "rejected_ids")
                file.writelines(json.dumps({key: row[key] for key in columns}) + "\n" for row in made.train_dataset)
        ready = time.perf_counter()
        made.train()
        trained = time.perf_counter()
        if options.save:
            made.save_model(options.save)
    result = {
        "system": "trl",
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "rows": len(made.train_dataset),
        "build_seconds": built - imported,  # loading, tokenising and, with precompute, the reference pass
        "train_seconds": trained - ready,
        "step_seconds": differences(clock.times),
        "step_cpu_seconds": differences(clock.cpu),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if options.cuda else 0,
        "logged": [{"step": row["step"], "loss": row["loss"]} for row in made.state.log_history if "loss" in row],
    }
    if options.losses:
        micro = made.recorded
        size = options.accumulate
        result["losses"] = [sum(micro[at : at + size]) / size for at in range(0, len(micro), size)]
    return result


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--model", required=True, help="folder of the model")
    made.add_argument("--train", required=True, help="JSONL of prompt, chosen, rejected")
    made.add_argument("--out", required=True, help="where the JSON goes")
    made.add_argument("--method", choices=("dpo", "orpo", "sft"), default="dpo")
    made.add_argument("--cuda", action="store_true", help="on the GPU")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--accumulate", type=int, default=1)
    made.add_argument("--steps", type=int)
    made.add_argument("--epochs", type=float, default=1.0)
    made.add_argument("--lr", type=float, default=1e-6)
    made.add_argument("--beta", type=float, default=0.1)
    made.add_argument("--schedule", default="linear")
    made.add_argument("--warmup", type=float, default=0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--lora", type=int, help="rank, on all linear layers, alpha twice that; without: full")
    made.add_argument("--dtype", choices=DTYPES, default="autocast", help="autocast (float32 weights) is TRL's own")
    made.add_argument("--checkpointing", choices=("on", "off"), help="gradient checkpointing; TRL's default is on")
    made.add_argument("--precompute", action="store_true", help="precompute_ref_log_probs")
    made.add_argument("--max-length", type=int)
    made.add_argument("--keep-unknown", action="store_true", help="repair the tokenizer's unknown token, see the function")
    made.add_argument("--logging-steps", type=int, default=10)
    made.add_argument("--losses", action="store_true", help="record every step's loss in full precision")
    made.add_argument("--dump-ids", help="where the token ids go")
    made.add_argument("--save", help="folder for the trained model")
    return made


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    options = parser().parse_args()
    Path(options.out).write_text(json.dumps(run(options)))
    sys.exit(0)

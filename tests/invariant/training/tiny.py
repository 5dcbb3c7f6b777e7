"""Tiny real models and data for the training tests, and a stage that runs in a process of its own.

python tiny.py WORK [key=value ...]      runs one stage in WORK; keys of STAGE below, and die=N, term=N
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from preftune.core.events import StepDone
from preftune.core.recipe import LoraConfig, ModelConfig, StageConfig
from preftune.core.records import Provenance, TokenisedCompletion, TokenisedExample
from preftune.maths.losses.base import BaseLoss
from preftune.maths.types import LossTerms, Term

VOCAB = 97
STAGE = {
    "method": "dpo",
    "loss": {"beta": 0.1},
    "adapter": "lora",
    "lora": LoraConfig(rank=4, alpha=8, dropout=0.1),
    "pairs_per_step": 4,
    "tokens_per_pack": 96,
    "lr": 1e-3,
    "epochs": 2.0,
    "evals": 2,
    "checkpoints": 3,
    "keep_checkpoints": 9,
    "probe": {"prompts": 3, "max_new_tokens": 6, "evals": 2},
}


def make_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A random two-layer Llama with a word-level tokenizer, saved as a model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def make_examples(count: int, seed: int = 0, completions: int = 2, prefix: str = "train") -> list[TokenisedExample]:
    """Random token ids; prompts of 3 to 12 tokens, completions of 2 to 15."""
    generator = np.random.default_rng(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(token) for token in generator.integers(3, VOCAB, generator.integers(low, high)))

    rows = []
    for index in range(count):
        answers = tuple(TokenisedCompletion(ids := (*draw(1, 15), 2), tuple(True for _ in ids)) for _ in range(completions))
        rows.append(
            TokenisedExample(f"{prefix}-{index}", (1, *draw(2, 12)), answers, provenance=Provenance(f"{prefix}.jsonl", index + 1))
        )
    return rows


def labelled(examples: list[TokenisedExample]) -> list[TokenisedExample]:
    """Some with both completions, some with one, and their labels."""
    return [
        replace(one, labels=(True, False))
        if at % 3 == 0
        else replace(one, completions=one.completions[:1], labels=(at % 2 == 0,))
        for at, one in enumerate(examples)
    ]


class Sorted(BaseLoss):
    """Batchwise: the chosen log-ratios in their order against the rejected ones in theirs."""

    is_batchwise = True

    def __call__(self, logps):
        chosen, rejected = logps.chosen_logratio, logps.rejected_logratio
        values = (0.3 * (chosen.sort().values - rejected.sort().values) - 1) ** 2
        return LossTerms({"sorted": Term(values, "pair")}, chosen.detach(), rejected.detach())


def make_plan(
    work: Path, model: Path, train=None, select=None, *, seed=0, folder="run", resume=False, precision="float32", **changes
):
    """A plan over fresh weights of ``model``; ``changes`` are fields of the stage."""
    from preftune.modeling.load import load_model
    from preftune.training.state import StagePlan

    config = StageConfig(**{"name": "dpo", **STAGE, **changes})
    kind = 1 if config.method == "sft" else 2
    train = make_examples(18, completions=kind) if train is None else train
    select = make_examples(7, 1, completions=kind, prefix="select") if select is None else select
    digest = f"recipe-{config.model_dump_json()}"
    return StagePlan(
        config=config,
        loaded=load_model(ModelConfig(name=str(model)), precision=precision),
        train=train,
        select=select,
        folder=work / folder,
        seed=seed,
        recipe_digest=digest,
        cache_folder=work / "cache",
        resume=resume,
    )


def losses_of(folder: Path) -> dict[int, float]:
    """The training loss of each step in a metrics file."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def main() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    from preftune.training.loop import run_stage

    work = Path(sys.argv[1])
    given = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in sys.argv[2:])}
    step, train = given.pop("die"), make_examples(given.pop("count"))

    def sink(event: object) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    run_stage(make_plan(work, work / "model", train, **given), sink)


if __name__ == "__main__":
    main()

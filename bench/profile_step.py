"""Where the time of one LoRA DPO step goes: the SmolLM2-135M shape, hh-rlhf lengths, reference cached.

    python bench/profile_step.py --steps 3 --threads 2 [--profile] [--prototype FOLDER]

With ``--prototype`` (the folder that holds shared_prefix_prototype.py) steps of preftune and of the prototype, on the
same pairs and with the same weights, alternate in one process; the ratio is what counts on a busy machine.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.core.recipe import LoraConfig
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import pack_step
from preftune.modeling.adapters import adapter_off, add_lora, trainable_parameters
from preftune.modeling.forward import Scorer

BETA = 0.1


def model_of(dtype: torch.dtype, layers: int) -> LlamaForCausalLM:
    """The SmolLM2-135M shape with random weights; parameters are cast, buffers (rotary frequencies) stay float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_theta=1e5,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.train(False)


def pairs_of(count: int, seed: int = 0) -> list[TokenisedExample]:
    """Lengths as in hh-rlhf helpful-base: log-normal, means about 137, 59 and 45 tokens."""
    draw = random.Random(seed)

    def length(mean: float, low: int, high: int) -> int:
        spread = 0.75
        return int(min(high, max(low, draw.lognormvariate(math.log(mean) - spread**2 / 2, spread))))

    def ids(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 49152) for _ in range(n))

    def completion(n: int) -> TokenisedCompletion:
        return TokenisedCompletion(ids(n), (True,) * n)

    return [
        TokenisedExample(str(i), ids(length(137, 20, 800)), (completion(length(59, 5, 400)), completion(length(45, 5, 400))))
        for i in range(count)
    ]


class Ours:
    """preftune's step with a cached reference."""

    def __init__(self, dtype: torch.dtype, tokens: int, layers: int) -> None:
        self.model = add_lora(model_of(dtype, layers), LoraConfig(rank=16, alpha=32.0), 0)
        self.scorer = Scorer(self.model, shared=True)
        self.parameters = list(trainable_parameters(self.model).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)
        self.tokens = tokens

    def prepare(self, pairs: list[TokenisedExample]) -> list[Any]:
        packs = pack_step(pairs, self.tokens)
        with torch.no_grad(), adapter_off(self.model):
            return [(pack, self.scorer.sequence_logps(pack).logps) for pack in packs]

    def step(self, prepared: list[Any]) -> float:
        total, count = 0.0, sum(pack.num_groups for pack, _ in prepared)
        for pack, reference in prepared:
            margin = (self.scorer.sequence_logps(pack).logps - reference).view(-1, 2)
            loss = -functional.logsigmoid(BETA * (margin[:, 0] - margin[:, 1])).sum() / count
            torch.autograd.backward(loss)
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class Prototype:
    """The measured prototype of the shared-prefix step, its reference cached too."""

    def __init__(self, folder: str, dtype: torch.dtype, tokens: int, layers: int) -> None:
        sys.path.insert(0, folder)
        import shared_prefix_prototype as prototype
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        self.lib = prototype
        model = model_of(dtype, layers)
        model.set_attn_implementation("prefix_shared")
        self.model = get_peft_model(model, PeftConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
        self.parameters = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0)
        self.tokens = tokens

    def prepare(self, pairs: list[TokenisedExample]) -> list[Any]:
        prepared = []
        for pack in pack_step(pairs, self.tokens):
            rows = [
                {
                    "prompt_ids": list(one.prompt_ids),
                    "chosen_ids": list(one.completions[0].ids),
                    "rejected_ids": list(one.completions[1].ids),
                }
                for one in pack.examples
            ]
            batch = self.lib.pack(rows)
            with torch.no_grad(), self.model.disable_adapter():
                prepared.append((batch, len(rows), self.lib.logps(self.model, batch, len(rows))))
        return prepared

    def step(self, prepared: list[Any]) -> float:
        total, count = 0.0, sum(n for _, n, _ in prepared)
        for batch, n, reference in prepared:
            margin = (self.lib.logps(self.model, batch, n) - reference).view(-1, 2)
            loss = -functional.logsigmoid(BETA * (margin[:, 0] - margin[:, 1])).sum() / count
            torch.autograd.backward(loss)
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def timed(step: Callable[[list[Any]], float], prepared: list[Any]) -> tuple[float, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step(prepared)
    return time.perf_counter() - wall, time.process_time() - cpu, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens-per-pack", type=int, default=2048)
    parser.add_argument("--prototype-tokens", type=int, default=1024)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--prototype", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = torch.float32 if options.float32 else torch.bfloat16
    sides: dict[str, Any] = {"preftune": Ours(dtype, options.tokens_per_pack, options.layers)}
    if options.prototype:
        sides["prototype"] = Prototype(options.prototype, dtype, options.prototype_tokens, options.layers)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(options.steps + 1):
        pairs = pairs_of(options.pairs, seed=number)
        for name, side in sides.items():
            wall, cpu, loss = timed(side.step, side.prepare(pairs))
            print(f"step {number} {name:10s} {wall:6.2f} s wall {cpu:6.2f} s processor  loss {loss:.4f}", flush=True)
            if number:
                seen[name].append((wall, cpu))
    for name, times in seen.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{name:10s} median {wall:.2f} s wall, {cpu:.2f} s processor a step")
    if options.profile:
        ours = sides["preftune"]
        prepared = ours.prepare(pairs_of(options.pairs, seed=1))
        with torch.profiler.profile() as profile:
            ours.step(prepared)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=50))


if __name__ == "__main__":
    main()

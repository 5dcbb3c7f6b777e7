"""The speed table on a GPU, one command: LoRA DPO in bfloat16 for the shapes of Qwen2.5-1.5B and of a 7B Llama.

    python bench/gpu.py [--shape 1.5b 7b] [--steps 6] [--pairs 16]

Random weights, lengths of hh-rlhf helpful-base, TRL and preftune alternating A B A B. Of TRL the best of a small grid. Model
FLOPs utilisation is useful products (bench/lora_speed.py) over time over the best rate of a sweep of matrix products in the
this process. Shared prefixes are also compared with one unpadded row a completion; the published 1.41 x (HH-RLHF, 7-8B,
FlexAttention) is against packed rows, which preftune does not have, so that ours is an upper bound of the same ratio. Raw
numbers go to bench/results/gpu.json. Exit status 2 without a GPU. Written where no GPU was at hand: never run on one yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inputs
import measure

RANK, TARGET, UTILISATION, PUBLISHED = 16, 2.0, 0.45, 1.41


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and which class has them."""

    kind: str
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    is_tied: bool

    @property
    def per_token(self) -> int:
        """Parameters of the layers that a token meets."""
        kv = self.width // self.heads * self.kv_heads
        return self.layers * (self.width * (2 * self.width + 2 * kv) + 3 * self.width * self.inner)


SHAPES = {
    "1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, is_tied=True),
    "7b": Shape("llama", 4096, 11008, 32, 32, 32, is_tied=False),
}
GRID = [(16, 1, "on"), (8, 2, "off"), (4, 4, "off"), (8, 2, "on")]  # pairs a micro-batch, accumulation, checkpointing


def make_model(folder: Path, shape: Shape) -> str:
    """A model of the shape with random weights in bfloat16 and the word tokenizer; made once."""
    if not (folder / "tokenizer.json").is_file():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            shape.kind,
            vocab_size=inputs.VOCABULARY,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            tie_word_embeddings=shape.is_tied,
            max_position_embeddings=8192,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        inputs.word_tokenizer().save_pretrained(folder)
    return str(folder)


def useful_flops(path: Path, shape: Shape, pairs: int) -> float:
    """4 N T and attention of a timed step on average, as in bench/lora_speed.py."""
    total = 0
    lines = path.read_text().splitlines()[pairs:]
    for row in map(json.loads, lines):
        prompt, *completions = (len(row[key].split()) for key in ("prompt", "chosen", "rejected"))
        completions = [one + 1 for one in completions]
        seen = prompt * (prompt + 1) // 2 + sum(one * prompt + one * (one + 1) // 2 for one in completions)
        total += 4 * shape.per_token * (prompt + sum(completions)) + 4 * shape.width * inputs.VOCABULARY * sum(completions)
        total += 12 * shape.layers * shape.width * seen
    return total * pairs / len(lines)


def ceiling() -> float:
    """Best rate of bfloat16 products on this GPU, FLOP/s."""
    import torch

    best = 0.0
    for size in (4096, 8192, 16384):
        one, other = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.mm(one, other)
            end.record()
            torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (start.elapsed_time(end) / 1e3))
    return best


def compare(name: str, steps: int, pairs: int, rounds: int) -> dict[str, Any]:
    """One shape: the grid of TRL, then ours shared, ours unshared and TRL's best in turn."""
    shape, folder = SHAPES[name], inputs.work_folder()
    model = make_model(folder / f"gpu-{name}", shape)
    rows = inputs.speed_rows(folder / f"gpu-{steps}-{pairs}", steps, pairs)["shuffled"]
    given = ("--model", model, "--train", str(rows), "--lr", "1e-5", "--lora", str(RANK), "--steps", str(1 + steps))

    def peer(point: tuple[int, int, str]) -> dict[str, Any]:
        batch, accumulate, checkpointing = point
        own = ("--batch", str(batch * pairs // 16), "--accumulate", str(accumulate), "--checkpointing", checkpointing)
        return measure.peer(*given, *own, "--dtype", "bfloat16-autocast", "--precompute", "--cuda")

    def ours(*own: str) -> dict[str, Any]:
        return measure.ours(*given, "--batch", str(pairs), "--dtype", "bfloat16", "--tokens-per-pack", "16384", *own)

    grid: dict[tuple[int, int, str], float] = {}
    refused: dict[str, str] = {}
    for point in GRID:
        try:
            grid[point] = statistics.mean(peer(point)["step_seconds"][1:])
        except measure.RunFailed as error:  # mostly memory
            refused[str(point)] = str(error).splitlines()[-1]
    if not grid:
        raise measure.RunFailed(f"no setting of TRL ran: {refused}")
    best = min(grid, key=grid.__getitem__)
    runs: dict[str, list[dict[str, Any]]] = {"shared": [], "unshared": [], "trl": []}
    for _ in range(rounds):
        runs["shared"].append(ours())
        runs["trl"].append(peer(best))
        runs["unshared"].append(ours("--no-sharing"))
    seconds = {side: statistics.median(statistics.mean(run["step_seconds"][1:]) for run in made) for side, made in runs.items()}
    flops, rate = useful_flops(rows, shape, pairs), ceiling()
    times, use = seconds["trl"] / seconds["shared"], flops / seconds["shared"] / rate
    return {
        "grid": {str(point): value for point, value in grid.items()},
        "refused": refused,
        "seconds_per_step": seconds,
        "peak_bytes": {side: statistics.median(run["peak_cuda_bytes"] for run in made) for side, made in runs.items()},
        "times_as_fast": times,
        "shared_over_rows": seconds["unshared"] / seconds["shared"],
        "published_shared_over_packed": PUBLISHED,
        "useful_flops": flops,
        "ceiling_flops": rate,
        "utilisation": use,
        "targets": {f"{TARGET:g} x TRL's best": times >= TARGET, f"utilisation {UTILISATION}": use >= UTILISATION},
        "runs": runs,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    made.add_argument("--steps", type=int, default=6)
    made.add_argument("--pairs", type=int, default=16)
    made.add_argument("--rounds", type=int, default=2)
    options = made.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: this bench needs one GPU with 24 GB for 1.5b, 48 GB for 7b", file=sys.stderr)
        return 2
    facts = measure.machine() | {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    found = {name: compare(name, options.steps, options.pairs, options.rounds) for name in options.shape}
    path = measure.BENCH / "results" / "gpu.json"
    path.write_text(json.dumps({"machine": facts, "shapes": found}, indent=1) + "\n")
    for name, one in found.items():
        measure.say(f"{name}: {one['times_as_fast']:.2f} x TRL's best, {100 * one['utilisation']:.0f} % of the ceiling")
    return 0 if all(met for one in found.values() for met in one["targets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

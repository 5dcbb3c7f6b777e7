"""What `preftune plan` predicts against what `preftune train` takes: memory and time, on layouts that fitted nothing.

    .venv/bin/python bench/prediction.py [--only WORDS] [--out FILE]

Each layout is planned and trained in processes of their own, one after the other; leave the machine alone meanwhile.
Exit status 0 where every prediction is within 25 % (memory) and 35 % (time), else 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STARTER = ROOT / "src" / "preftune" / "starter"
MEMORY, TIME = 0.25, 0.35
LONG = "long pairs"  # pairs of about 1,500 tokens; a random model with enough positions
LAYOUTS: dict[str, dict[str, Any]] = {
    "starter, full, packs of 512": {"adapter": "full", "tokens_per_pack": 512, "pairs_per_step": 8},
    "starter, full, packs of 2048": {"adapter": "full", "tokens_per_pack": 2048, "pairs_per_step": 16},
    "starter, LoRA, packs of 4096": {"adapter": {"rank": 8}, "tokens_per_pack": 4096, "pairs_per_step": 32},
    "starter, full, recomputed": {"adapter": "full", "gradient_checkpointing": True, "pairs_per_step": 16},
    f"{LONG}, full": {"adapter": "full", "pairs_per_step": 4, "max_steps": 4},
    f"{LONG}, LoRA, recomputed": {"adapter": {"rank": 8}, "gradient_checkpointing": True, "pairs_per_step": 4, "max_steps": 4},
    f"{LONG}, full, offloaded": {"adapter": "full", "activation_offloading": "disk", "pairs_per_step": 4, "max_steps": 4},
    "starter, SFT": {"adapter": "full", "method": "sft", "pairs_per_step": 16},
}


def preftune(folder: Path, *arguments: str) -> dict[str, Any]:
    """One verb in a process of its own; its JSON."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFTUNE_")}
    place = {"PREFTUNE_CACHE": str(folder / "cache"), "PREFTUNE_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).with_name("preftune")), *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, env=kept | place, capture_output=True, text=True, check=False)
    if done.returncode != 0 and not (
        arguments[0] == "plan" and done.stdout
    ):  # a random model is blocked as one that cannot do the task
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def long_model(folder: Path) -> Path:
    """Six layers, random, with the starter's tokenizer and 8,192 positions."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(STARTER / "model")
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192, bos_token_id=0, eos_token_id=3, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def long_pairs(path: Path) -> Path:
    """24 pairs whose prompts hold the stories of a dozen others."""
    rows = [json.loads(line) for line in (STARTER / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(24):
            told = " ".join(row["chosen"][-1]["content"] for row in rows[24 + number * 12 : 36 + number * 12 - number % 5])
            row = dict(rows[number])
            row["prompt"] = [{"role": "user", "content": f"{told} {row['prompt'][-1]['content']}"}]
            file.write(json.dumps(row) + "\n")
    return path


def measure(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Plan and train one layout."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        data: dict[str, Any] = {"train": str(STARTER / "pairs.jsonl"), "select": 0.1, "limit": 300}
        model = {"name": "starter", "dtype": "float32"}
        if name.startswith(LONG):
            model["name"] = str(long_model(folder / "model"))
            data |= {"train": str(long_pairs(folder / "long.jsonl")), "max_length": 8000}
        (folder / "recipe.yaml").write_text(json.dumps({"model": model, "data": data, "lr": 1e-5, **settings}), encoding="utf-8")
        planned = preftune(folder, "plan", "recipe.yaml", "--probe")["probes"][0]["prediction"]
        (stage,) = preftune(folder, "train", "recipe.yaml", "--no-probe")["stages"]
    seconds = planned["training_s"] + planned["evaluation_s"] + planned["saving_s"] + planned["probing_s"]
    return {
        "layout": name,
        "memory_gb": [planned["peak_bytes"] / 1e9, stage["peak_memory_bytes"] / 1e9],
        "seconds": [seconds, stage["seconds"]],
        "memory_error": planned["peak_bytes"] / stage["peak_memory_bytes"] - 1,
        "time_error": seconds / stage["seconds"] - 1,
    }


def main() -> int:
    """Measure every layout and print the table."""
    rows = []
    print("| layout | memory predicted / taken | time predicted / taken |\n|---|---|---|")
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
    for name, settings in LAYOUTS.items():
        if only not in name:
            continue
        row = measure(name, settings)
        rows.append(row)
        (memory, took_memory), (seconds, took) = row["memory_gb"], row["seconds"]
        print(
            f"| {name} | {memory:.2f} / {took_memory:.2f} GB ({row['memory_error']:+.0%}) "
            f"| {seconds:.1f} / {took:.1f} s ({row['time_error']:+.0%}) |",
            flush=True,
        )
    if "--out" in sys.argv:
        Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0 if all(abs(row["memory_error"]) <= MEMORY and abs(row["time_error"]) <= TIME for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

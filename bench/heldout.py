"""Held-out preference accuracy of a trained model against the model it started from, by a judge that is neither system.

Plain transformers, float32, one row a completion, no padding: log p of the completion's tokens given the prompt, policy
minus reference, chosen against rejected. Exact over pairs, a tie counts one half.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def completion_logp(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Sum of the completion's token log-probabilities, nats."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float(torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(completion)[:, None]).sum())


def log_odds(model: Any, row: dict[str, list[int]]) -> float:
    """log p(chosen) - log p(rejected), nats."""
    chosen, rejected = (completion_logp(model, row["prompt_ids"], row[key]) for key in ("chosen_ids", "rejected_ids"))
    return chosen - rejected


def margins(policy: str, reference: str, rows: Sequence[dict[str, list[int]]]) -> list[float]:
    """Log-ratio of chosen minus that of rejected for every pair, nats (not times beta)."""
    found = []
    for name in (policy, reference):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        found.append([log_odds(model, row) for row in rows])
    return [after - before for after, before in zip(*found, strict=True)]


def accuracy(found: Sequence[float]) -> float:
    """Share of pairs with a positive margin; a tie is one half."""
    return sum(1.0 if one > 0 else 0.5 if one == 0 else 0.0 for one in found) / len(found)


if __name__ == "__main__":
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--policy", required=True)
    made.add_argument("--reference", required=True)
    made.add_argument("--ids", required=True, help="JSONL of prompt_ids, chosen_ids, rejected_ids")
    made.add_argument("--out", required=True)
    options = made.parse_args()
    rows = [json.loads(line) for line in Path(options.ids).read_text().splitlines()]
    found = margins(options.policy, options.reference, rows)
    result = {"pairs": len(rows), "accuracy": accuracy(found), "mean_margin": sum(found) / len(found), "margins": found}
    Path(options.out).write_text(json.dumps(result))

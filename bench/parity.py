"""Is it the same training? TRL and preftune on the same rows, weights, order and settings: token ids and per-step losses.

tinystories-656k, full fine-tuning, float32, rasbt-preference: DPO, and the losses of `parity_losses`. Exit status 1 where ids
differ or a loss differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import inputs
import measure
import parity_losses

TOLERANCE = 1e-4  # nats, of a step's mean loss
SETTINGS = ("--batch", "8", "--beta", "0.1", "--lr", "2e-4", "--warmup", "0.1", "--schedule", "linear", "--max-length", "512")
# transformers rebuilds this model's tokenizer without its unknown token, so such characters vanish; preftune gives it back
PEER_SETTINGS = (*SETTINGS, "--dtype", "float32", "--checkpointing", "off", "--keep-unknown")
OUR_SETTINGS = (*SETTINGS, "--dtype", "float32")


def same_ids(first: Path, second: Path) -> int:
    """Rows whose token ids differ in any column."""
    rows = [path.read_text().splitlines() for path in (first, second)]
    if len(rows[0]) != len(rows[1]):
        return max(len(rows[0]), len(rows[1]))
    return sum(json.loads(one) != json.loads(other) for one, other in zip(*rows, strict=True))


def parity(steps: int, seed: int) -> dict[str, Any]:
    """The two runs and their largest gap."""
    train, _, left_out = inputs.rasbt_rows()
    random.Random(seed).shuffle(train)
    model = str(inputs.TINYSTORIES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = str(inputs.write_rows(folder / "train.jsonl", train[: 8 * steps]))
        given = ("--model", model, "--train", rows, "--seed", str(seed))
        theirs = measure.peer(*given, *PEER_SETTINGS, "--losses", "--dump-ids", str(folder / "trl.jsonl"))
        ours = measure.ours(*given, *OUR_SETTINGS, "--dump-ids", str(folder / "ours.jsonl"))
        differing = same_ids(folder / "trl.jsonl", folder / "ours.jsonl")
    gaps = [abs(one - other) for one, other in zip(theirs["losses"], ours["losses"], strict=True)]
    return {
        "seed": seed,
        "steps": len(gaps),
        "rows": ours["rows"],
        "left_out": left_out,
        "rows_with_other_ids": differing,
        "largest_gap": max(gaps),
        "tolerance": TOLERANCE,
        "is_equal": differing == 0 and max(gaps) <= TOLERANCE,
        "first_losses": [theirs["losses"][0], ours["losses"][0]],
        "last_losses": [theirs["losses"][-1], ours["losses"][-1]],
        "losses": {"trl": theirs["losses"], "preftune": ours["losses"]},
        "layout": ours["facts"].get("layout"),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", help="also write the result, as JSON")
    made.add_argument("--loss-steps", type=int, default=10, help="steps of the losses beside DPO; 0 leaves them out")
    options = made.parse_args(arguments)
    found = parity(options.steps, options.seed)
    if options.loss_steps:
        train, _, _ = inputs.rasbt_rows()
        random.Random(options.seed).shuffle(train)
        found["by_loss"] = parity_losses.compare_all(train, options.seed, options.loss_steps, TOLERANCE)
        found["is_equal"] = found["is_equal"] and all(one["is_equal"] for one in found["by_loss"].values())
    if options.out:
        Path(options.out).write_text(json.dumps(found))
    measure.say(
        f"parity: {found['steps']} steps, {found['rows_with_other_ids']} rows with other ids, "
        f"largest gap of a loss {found['largest_gap']:.2g} (at most {TOLERANCE:g})"
    )
    return found


if __name__ == "__main__":
    sys.exit(0 if main()["is_equal"] else 1)

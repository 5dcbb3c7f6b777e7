"""Is it as good, and how long does it take? Full DPO on tinystories-656k with both systems, seed after seed, alternating.

The seed decides the order of the rows; both systems train one epoch in that order. Held-out accuracy comes from a plain
forward pass of the saved model that belongs to neither (`heldout.py`). Wall time of training includes the reference: TRL
runs it inside each step, preftune fills its cache first.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import inputs
import measure
from parity import OUR_SETTINGS, PEER_SETTINGS, same_ids

ALLOWED_LOSS = 0.02  # of held-out accuracy
ALLOWED_TIME = 1 / 3  # of TRL's


def compare(seeds: Sequence[int]) -> dict[str, Any]:
    """Both systems on every seed."""
    train, held, left_out = inputs.rasbt_rows()
    model = str(inputs.TINYSTORIES)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # token ids of the held-out rows, from either system's own tokenising, by a run of one step
        given = ("--model", model, "--train", str(inputs.write_rows(folder / "held.jsonl", held)), "--steps", "1")
        measure.ours(*given, *OUR_SETTINGS, "--dump-ids", str(folder / "held-ours.jsonl"))
        measure.peer(*given, *PEER_SETTINGS, "--dump-ids", str(folder / "held-trl.jsonl"))
        if same_ids(folder / "held-ours.jsonl", folder / "held-trl.jsonl"):
            raise measure.RunFailed("the two systems tokenise the held-out rows differently")
        for seed in seeds:
            order = random.Random(seed).sample(train, len(train))
            given = ("--model", model, "--train", str(inputs.write_rows(folder / "train.jsonl", order)), "--seed", str(seed))
            found: dict[str, Any] = {"seed": seed}
            for system in ("trl", "preftune") if seed % 2 == 0 else ("preftune", "trl"):
                save = folder / system
                shutil.rmtree(save, ignore_errors=True)
                if system == "trl":
                    done, policy = measure.peer(*given, *PEER_SETTINGS, "--save", str(save)), save
                else:
                    done = measure.ours(*given, *OUR_SETTINGS, "--save", str(save))
                    policy = Path(done["final"])
                judged = measure.heldout(str(policy), model, str(folder / "held-ours.jsonl"))
                found[system] = {
                    "accuracy": judged["accuracy"],
                    "mean_margin": judged["mean_margin"],
                    **{key: done[key] for key in ("train_seconds", "build_seconds", "process_seconds", "peak_rss_bytes")},
                    "prepare_seconds": done.get("prepare_seconds"),
                    "median_step_seconds": statistics.median(done["step_seconds"][1:]),
                    "steps": len(done["step_seconds"]),
                }
                one = found[system]
                measure.say(
                    f"seed {seed} {system:8}  accuracy {one['accuracy']:.3f}  training {one['train_seconds']:.1f} s  "
                    f"step {1000 * one['median_step_seconds']:.0f} ms  whole process {one['process_seconds']:.1f} s"
                )
            rounds.append(found)
    return summary(rounds) | {"pairs": len(train), "held_out": len(held), "left_out": left_out, "rounds": rounds}


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of accuracy, medians of time, ratios, and whether the targets are met."""

    def middle(system: str, key: str) -> float:
        return float(statistics.median(one[system][key] for one in rounds))

    accuracy = {system: statistics.mean(one[system]["accuracy"] for one in rounds) for system in ("trl", "preftune")}
    ratio = middle("preftune", "train_seconds") / middle("trl", "train_seconds")
    return {
        "accuracy": accuracy,
        "train_seconds": {system: middle(system, "train_seconds") for system in ("trl", "preftune")},
        "process_seconds": {system: middle(system, "process_seconds") for system in ("trl", "preftune")},
        "time_ratio": ratio,
        "process_time_ratio": middle("preftune", "process_seconds") / middle("trl", "process_seconds"),
        "targets": {
            "accuracy at least TRL's minus 2 points": accuracy["preftune"] >= accuracy["trl"] - ALLOWED_LOSS,
            "training at most a third of TRL's time": ratio <= ALLOWED_TIME,
        },
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--out", help="also write the result, as JSON")
    options = made.parse_args(arguments)
    found = compare(range(options.seeds))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1))
    measure.say(
        f"quality: accuracy TRL {found['accuracy']['trl']:.3f}, preftune {found['accuracy']['preftune']:.3f}; "
        f"training takes {found['time_ratio']:.2f} of TRL's time ({found['process_time_ratio']:.2f} of the whole process)"
    )
    return found


if __name__ == "__main__":
    sys.exit(0 if all(main()["targets"].values()) else 1)

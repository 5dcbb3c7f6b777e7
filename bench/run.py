"""Runs every comparison with the peer and writes `bench/results/*.json` and the table `bench/results/README.md`.

Unattended, at most about 40 minutes on two quiet cores. `--only PART ...` (parity, quality, lora, full, orpo, sft, serving)
runs some parts; the table is then made of the new ones and of what the other parts' files say. So a run that was cut short is
taken up with the parts that are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import inputs
import lora_speed
import measure
import parity
import quality_vs_trl
import serving
import table

RESULTS = measure.BENCH / "results"
PARTS: Mapping[str, Callable[[list[str]], dict[str, Any]]] = {
    "parity": parity.main,
    "quality": quality_vs_trl.main,
    "lora": lora_speed.main,
    "full": lambda given: lora_speed.main(["--case", "full", *given]),
    "orpo": lambda given: lora_speed.main(["--case", "orpo", *given]),
    "sft": lambda given: lora_speed.main(["--case", "sft", *given]),
    "serving": serving.main,
}
QUICK: Mapping[str, list[str]] = {
    "parity": ["--steps", "10", "--loss-steps", "3"],
    "quality": ["--seeds", "1"],
    "lora": ["--steps", "2", "--rounds", "1", "--probe-seconds", "0"],
    "full": ["--steps", "1", "--rounds", "1", "--probe-seconds", "0"],
    "orpo": ["--steps", "1", "--rounds", "1", "--probe-seconds", "0"],
    "sft": ["--steps", "1", "--rounds", "1", "--probe-seconds", "0"],
    "serving": ["--kinds", "tiny", "--dtypes", "float32", "--rounds", "1", "--tokens", "8"],
}
FULL_RUN: Mapping[str, list[str]] = {  # so that everything together stays within its time
    "lora": ["--probe-seconds", "100"],
    "full": ["--steps", "2", "--rounds", "1", "--probe-seconds", "60"],
    "orpo": ["--steps", "2", "--rounds", "1", "--probe-seconds", "60"],
    "sft": ["--steps", "2", "--rounds", "1", "--probe-seconds", "60"],
}
Found = dict[str, Any]


def why_not() -> str:
    """What is missing for a run, and the way out; empty where nothing is."""
    if not measure.PEER_PYTHON.is_file():
        return "the peer's environment is absent: run bench/environments/make.sh trl"
    if not inputs.DATA.is_dir():
        return f"real inputs are absent: {inputs.DATA} is not a folder"
    return ""


def is_good(found: Found) -> bool:
    """Whether a part's checks and targets are met."""
    return bool(found.get("is_equal", True)) and all(found.get("targets", {}).values())


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--only", choices=tuple(PARTS), nargs="+", help="run these parts alone")
    made.add_argument(
        "--quick", action="store_true", help="a rehearsal: one seed, one round, one point of the grid; keeps nothing"
    )
    options = made.parse_args()
    missing = why_not()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    is_everything_good = True
    facts = measure.machine()
    measure.say(f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB, load {facts['load_at_start']:.1f}")
    if facts["load_at_start"] > 0.5:
        measure.say("other processes are busy: expect times that do not repeat")
    for name in options.only or list(PARTS):
        start = time.monotonic()
        measure.say(f"---- {name}")
        try:
            found = PARTS[name](QUICK[name] if options.quick else FULL_RUN.get(name, []))
        except measure.RunFailed as error:
            measure.say(f"{name} failed: {error}")
            is_everything_good = False
            continue
        found |= {"machine": facts, "seconds": time.monotonic() - start}
        is_everything_good &= is_good(found)
        for target, is_met in found.get("targets", {}).items():
            measure.say(f"{'met   ' if is_met else 'MISSED'} {target}")
        if not options.quick:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            (RESULTS / "README.md").write_text(table.page(RESULTS))
    return 0 if is_everything_good else 1


if __name__ == "__main__":
    sys.exit(main())

"""How fast is a step? SmolLM2-135M's shape, hh-rlhf helpful-base lengths, 8 pairs a step; TRL against preftune.

Four cases: LoRA DPO, full DPO, LoRA ORPO, LoRA SFT (on the chosen completions); `--case` names one.

Each run is a fresh process. The timed steps of all runs hold the same pairs; the first step is not timed. First the grid of
TRL's settings is probed with the allocator settings that preftune uses, coordinate by coordinate; then TRL as installed,
TRL's best two and preftune run in turn, and medians over the rounds are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import inputs
import measure

PAIRS = 8
RANK = 16
LAYERS, WIDTH, INNER, KV_WIDTH = 30, 576, 1536, 192  # of SmolLM2-135M
CEILING_SHARE = 0.45


@dataclass(frozen=True)
class Case:
    """What is trained, and what must come out: times as fast as TRL as installed and at its best, share of its memory."""

    method: str
    is_lora: bool
    installed: float | None
    best: float | None
    memory: float | None

    @property
    def options(self) -> list[str]:
        """For either system."""
        return ["--method", self.method, "--lr", "1e-5", *(["--lora", str(RANK)] if self.is_lora else [])]

    @property
    def has_reference(self) -> bool:
        return self.method == "dpo"


CASES = {
    "lora": Case("dpo", is_lora=True, installed=12.0, best=3.5, memory=0.45),
    "full": Case("dpo", is_lora=False, installed=None, best=2.5, memory=0.6),
    "orpo": Case("orpo", is_lora=True, installed=3.0, best=None, memory=None),
    "sft": Case("sft", is_lora=True, installed=3.0, best=None, memory=None),
}


@dataclass(frozen=True)
class Setting:
    """One point of TRL's grid."""

    split: tuple[int, int] = (8, 1)  # pairs a micro-batch, micro-batches a step
    dtype: str = "autocast"
    checkpointing: bool = True
    precompute: bool = False
    order: str = "shuffled"

    def __str__(self) -> str:
        words = [f"{self.split[0]}x{self.split[1]}", self.dtype, "checkpointing" if self.checkpointing else "no checkpointing"]
        words += ["reference precomputed"] if self.precompute else []
        return ", ".join([*words, *(["grouped by length"] if self.order == "grouped" else [])])

    @property
    def options(self) -> list[str]:
        return [
            *("--batch", str(self.split[0]), "--accumulate", str(self.split[1]), "--dtype", self.dtype),
            *("--checkpointing", "on" if self.checkpointing else "off", *(["--precompute"] if self.precompute else [])),
        ]

    @property
    def needed_bytes(self) -> float:
        """About what the process takes at its peak; a run that does not fit would be killed, or push others out."""
        per_pair = 1.6 if self.checkpointing else 3.8 * (2 if self.dtype == "float32" else 1)
        return (2.5 + per_pair * self.split[0]) * measure.GIB


AS_INSTALLED = Setting()
START = Setting((2, 4), "bfloat16-autocast", checkpointing=False, precompute=True)  # the best of the last full grid
TOKENS_PER_PACK = 2048  # the default; 1,024 takes 0.9 GB less and about 15 % more time


class Bench:
    """The inputs, and every run so far."""

    def __init__(self, steps: int, case: Case) -> None:
        folder = inputs.work_folder()
        self.case = case
        self.steps = steps
        self.model = str(inputs.smol_shape(folder / "smol-135m"))
        self.rows = inputs.speed_rows(folder / f"speed-{steps}", steps, PAIRS)
        self.runs: list[dict[str, Any]] = []
        self.refused: dict[str, str] = {}

    def rows_for(self, order: str, timed: int) -> str:
        """A file with the rows of one untimed and `timed` timed steps."""
        if timed == self.steps:
            return str(self.rows[order])
        path = self.rows[order].with_name(f"{order}-{timed}.jsonl")
        path.write_text("".join(line + "\n" for line in self.rows[order].read_text().splitlines()[: PAIRS * (1 + timed)]))
        return str(path)

    def peer(self, setting: Setting, timed: int, *, allocator: bool, kind: str) -> dict[str, Any] | None:
        """One run of TRL; None, with the reason kept, where it does not fit or fails."""
        name = str(setting) + (" | same allocator" if allocator else " | as installed")
        if measure.available_bytes() < setting.needed_bytes:
            self.refused[name] = f"needs about {setting.needed_bytes / measure.GIB:.0f} GiB"
            measure.say(f"left out: {name}: {self.refused[name]}")
            return None
        given = ("--model", self.model, "--train", self.rows_for(setting.order, timed), *self.case.options)
        given = (*given, "--steps", str(1 + timed))
        try:
            done = measure.peer(*given, *setting.options, allocator=allocator)
        except measure.RunFailed as error:
            self.refused[name] = str(error)
            measure.say(f"failed: {name}: {error}")
            return None
        return self.keep(done, "trl", name, timed, kind)

    def ours(self, kind: str) -> dict[str, Any]:
        """One run of preftune on all steps."""
        given = ("--model", self.model, "--train", self.rows_for("shuffled", self.steps), *self.case.options)
        given = (*given, "--steps", str(1 + self.steps))
        done = measure.ours(*given, "--dtype", "bfloat16", "--tokens-per-pack", str(TOKENS_PER_PACK), "--compile", "on")
        return self.keep(done, "preftune", "preftune", self.steps, kind)

    def keep(self, done: dict[str, Any], system: str, name: str, timed: int, kind: str) -> dict[str, Any]:
        steps = done["step_seconds"][1:]
        assert len(steps) == timed, f"{name}: {len(steps)} timed steps, not {timed}"
        # in the first epoch the reference is scored too: in TRL's steps unless it is precomputed (then see its twin without)
        first = statistics.mean(steps)
        if system == "preftune":
            first += done["reference_seconds"] / (1 + timed)
        found = {
            "system": system,
            "setting": name,
            "kind": kind,
            "timed_steps": timed,
            "step_seconds": steps,
            "seconds_per_step": statistics.mean(steps),
            "cpu_seconds_per_step": statistics.mean(done["step_cpu_seconds"][1:]),
            "first_epoch_seconds_per_step": None if "precomputed" in name else first,
            "once_seconds": done.get("prepare_seconds", 0.0) - done.get("reference_seconds", 0.0),
            "peak_rss_bytes": done["peak_rss_bytes"],
            "process_seconds": done["process_seconds"],
            "threads": done["threads"],
        }
        self.runs.append(found)
        measure.say(f"{kind:6} {name:90} {found['seconds_per_step']:7.2f} s/step  peak {found['peak_rss_bytes'] / 1e9:4.1f} GB")
        return found


def probe(bench: Bench, deadline: float) -> list[Setting]:
    """The best setting of TRL, grouped by length and not; found coordinate by coordinate from the best that was known."""
    seconds: dict[Setting, float] = {}

    def look(*settings: Setting) -> Setting:
        for setting in settings:
            if setting not in seconds and not (seconds and time.monotonic() > deadline):
                done = bench.peer(setting, 2, allocator=True, kind="probe")
                seconds[setting] = float("inf") if done is None else done["seconds_per_step"]
        return min(seconds, key=seconds.__getitem__)

    start = replace(START, precompute=bench.case.has_reference)
    best = look(*(replace(start, split=split) for split in ((2, 4), (1, 8), (4, 2), (8, 1))))
    best = look(*(replace(best, dtype=dtype) for dtype in ("bfloat16-autocast", "bfloat16", "autocast", "float32")))
    best = look(*(replace(best, checkpointing=True, split=split) for split in (best.split, (8, 1))))
    if bench.case.has_reference:
        best = look(replace(best, precompute=False))
    if seconds[best] == float("inf"):
        raise measure.RunFailed("no setting of TRL ran")
    # grouped batches differ in length by design, so only all of them together hold the same pairs: the rounds decide. A
    # micro-batch of one pair is grouped already, so that it is the fastest of several pairs which grouping may bring ahead
    several = [one for one, time_taken in seconds.items() if one.split[0] > 1 and time_taken < float("inf")]
    grouped = [replace(min(several, key=seconds.__getitem__), order="grouped")] if several else []
    return [*grouped, best]


def rounds(bench: Bench, best: Sequence[Setting], number: int) -> None:
    """Alternate: ours, TRL's best two, ours, as installed; again in the other order. Once: the best's first epoch."""
    for at in range(number):
        turn: list[tuple[Setting | None, int, bool]] = [(None, bench.steps, True)]
        turn += [(setting, bench.steps, True) for setting in best]
        turn += [(None, bench.steps, True), (AS_INSTALLED, 2, False)]
        if at == 0 and bench.case.has_reference:
            turn += [(replace(best[-1], precompute=False), bench.steps, True), (AS_INSTALLED, 2, True)]
        for setting, timed, allocator in turn if at % 2 == 0 else reversed(turn):
            if setting is None:
                bench.ours("round")
            else:
                bench.peer(setting, timed, allocator=allocator, kind="round")


def summary(bench: Bench) -> dict[str, Any]:
    """Medians over rounds. Every ratio is taken over the same pairs: as installed ran the first two timed steps only."""
    table: dict[str, list[dict[str, Any]]] = {}
    for run in bench.runs:
        if run["kind"] == "round":
            table.setdefault(run["setting"], []).append(run)
    ours = table.pop("preftune")

    def middle(runs: Sequence[dict[str, Any]], key: str) -> float:
        return float(statistics.median(run[key] for run in runs))

    def of_ours(timed: int) -> float:
        return float(statistics.median(statistics.mean(run["step_seconds"][:timed]) for run in ours))

    def first_epoch(name: str) -> float | None:
        twin = table.get(name.replace(", reference precomputed", ""))
        return None if twin is None else middle(twin, "first_epoch_seconds_per_step")

    found: list[dict[str, Any]] = []
    for name, runs in table.items():
        timed = runs[0]["timed_steps"]
        found.append(
            {
                "setting": name,
                "rounds": len(runs),
                "seconds_per_step": middle(runs, "seconds_per_step"),
                "first_epoch_seconds_per_step": first_epoch(name),
                "peak_rss_bytes": middle(runs, "peak_rss_bytes"),
                "preftune_seconds_on_the_same_pairs": of_ours(timed),
                "times_slower": middle(runs, "seconds_per_step") / of_ours(timed),
                "our_share_of_memory": middle(ours, "peak_rss_bytes") / middle(runs, "peak_rss_bytes"),
            }
        )
    installed = next((one for one in found if one["setting"] == f"{AS_INSTALLED} | as installed"), None)
    same = [one for one in found if "same allocator" in one["setting"]]
    best = min(same, key=lambda one: one["seconds_per_step"]) if same else None
    keys = ("seconds_per_step", "first_epoch_seconds_per_step", "once_seconds", "peak_rss_bytes")
    precision = "bfloat16, float32 adapters" if bench.case.is_lora else "bfloat16, float32 masters"
    setting = f"packs of {TOKENS_PER_PACK:,} tokens, {precision}{', reference cached' if bench.case.has_reference else ''}"
    targets: dict[str, bool] = {}
    if bench.case.installed is not None:
        is_met = bool(installed and installed["times_slower"] >= bench.case.installed)
        targets[f"{bench.case.installed:g} times as fast as TRL as installed"] = is_met
    if bench.case.best is not None:
        is_met = bool(best and best["times_slower"] >= bench.case.best)
        targets[f"{bench.case.best:g} times as fast as TRL's best, same allocator"] = is_met
    if bench.case.memory is not None:
        is_met = bool(best and best["our_share_of_memory"] <= bench.case.memory)
        targets[f"at most {100 * bench.case.memory:.0f} % of that one's peak memory"] = is_met
    return {
        "method": bench.case.method,
        "is_lora": bench.case.is_lora,
        "preftune": {"setting": setting, "rounds": len(ours)} | {key: middle(ours, key) for key in keys},
        "trl": found,
        "best": None if best is None else best["setting"],
        "targets": targets,
        "refused": bench.refused,
    }


def useful_flops(path: str, case: Case) -> float:
    """Of a timed step on average: 4 N T (6 N T where all weights train) and attention, N parameters that a token meets.

    T are the tokens of the shared layout, for the head those of completions. Adapters, recomputation and the reference
    are not counted. Lengths are the words of the rows, the end token added.
    """
    factor = 4 if case.is_lora else 6
    layer = WIDTH * (2 * WIDTH + 2 * KV_WIDTH) + 3 * WIDTH * INNER
    total = 0
    lines = Path(path).read_text().splitlines()[PAIRS:]
    for row in map(json.loads, lines):
        prompt = len(row["prompt"].split())
        sides = ("chosen",) if case.method == "sft" else ("chosen", "rejected")
        completions = [len(row[side].split()) + 1 for side in sides]
        seen = prompt * (prompt + 1) // 2 + sum(one * prompt + one * (one + 1) // 2 for one in completions)
        total += factor * LAYERS * layer * (prompt + sum(completions)) + factor * WIDTH * inputs.VOCABULARY * sum(completions)
        total += 12 * LAYERS * WIDTH * seen
    return total * PAIRS / len(lines)


def compare(case: Case, steps: int, number: int, probe_seconds: float) -> dict[str, Any]:
    """The whole comparison."""
    bench = Bench(steps, case)
    equality = measure.equality(bench.model, str(bench.rows["shuffled"]), ceiling_only=case is not CASES["lora"])
    failed = [name for name, is_met in equality.get("checks", {}).items() if not is_met]
    measure.say(f"equality of the timed path: {'all checks met' if not failed else 'FAILED: ' + '; '.join(failed)}")
    best = probe(bench, time.monotonic() + probe_seconds)
    measure.say(f"in the rounds: {'; '.join(map(str, best))}")
    rounds(bench, best, number)
    found = summary(bench) | {"equality": equality, "runs": bench.runs, "is_equal": not failed}
    flops = useful_flops(str(bench.rows["shuffled"]), case)
    rate = flops / found["preftune"]["seconds_per_step"] / 1e9
    found["flops"] = {"useful_tflop_per_step": flops / 1e12, "share_of_ceiling": rate / equality["ceiling_gflops"]["bfloat16"]}
    if case is CASES["lora"]:
        name = f"at least {100 * CEILING_SHARE:.0f} % of the bfloat16 ceiling in useful products"
        found["targets"][name] = found["flops"]["share_of_ceiling"] >= CEILING_SHARE
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--case", choices=tuple(CASES), default="lora")
    made.add_argument("--steps", type=int, default=4, help="timed steps of a run")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--probe-seconds", type=float, default=420, help="no new point of the grid after so long")
    made.add_argument("--out", help="also write the result, as JSON")
    options = made.parse_args(arguments)
    found = compare(CASES[options.case], options.steps, options.rounds, options.probe_seconds)
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1))
    for one in sorted(found["trl"], key=lambda one: one["seconds_per_step"]):
        measure.say(
            f"speed: {one['times_slower']:.1f} times TRL {one['setting']} ({one['seconds_per_step']:.2f} against "
            f"{one['preftune_seconds_on_the_same_pairs']:.2f} s), {100 * one['our_share_of_memory']:.0f} % of its peak memory"
        )
    return found


if __name__ == "__main__":
    found = main()
    sys.exit(0 if found["is_equal"] and all(found["targets"].values()) else 1)

"""Step-by-step equality with TRL's own trainers for the losses beside DPO: the same rows, weights, order and settings.

Where two definitions differ, the row says so and compares what is common:
    ipo    TRL divides log-ratios by length: `length_normalised`.
    simpo  TRL adds the NLL of the chosen completion unless `cpo_alpha=0`.
    orpo   TRL's NLL is over prompt and answer, `nll_scope: prompt_and_answer`, and averages the tokens of a micro-batch: one
           pair in each. With the answer alone the first loss differs, and by what is reported.
    kto    TRL's partners are neighbours in the batch; preftune is handed the same ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inputs
import measure

BATCH = 8


@dataclass(frozen=True)
class Case:
    """One loss in both systems' words. micro: pairs of a micro-batch of TRL's; other: options that it cannot take."""

    theirs: Mapping[str, Any]
    ours: Mapping[str, Any]
    lr: float
    micro: int = BATCH
    other: Mapping[str, Any] | None = None
    note: str = ""


CASES: Mapping[str, Case] = {
    "ipo": Case({"beta": 0.5}, {"tau": 0.5, "length_normalised": True}, 2e-4, note="log-ratios by length"),
    "simpo": Case({"beta": 2.0, "simpo_gamma": 0.8}, {"beta": 2.0, "gamma": 0.8}, 2e-4, note="cpo_alpha 0"),
    "orpo": Case(
        {"beta": 0.2},
        {"lambda_or": 0.2, "nll_scope": "prompt_and_answer"},
        2e-4,
        1,
        other={"lambda_or": 0.2},
        note="NLL over prompt and answer, pair by pair",
    ),
    "kto": Case(
        {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.9},
        {"beta": 0.2, "lambda_d": 1.2, "lambda_u": 0.9},
        2e-4,
        note="TRL's partners",
    ),
}


@dataclass
class Compared:
    """What one loss gave in both systems."""

    rows_with_other_ids: int
    largest_gap: float
    losses: dict[str, list[float]] = field(default_factory=dict)


def compare(method: str, rows: Sequence[inputs.Row], seed: int, steps: int, *, is_other: bool = False) -> Compared:
    """Both systems on these rows; is_other: with the options that the peer cannot take."""
    case = CASES[method]
    options = (case.other or {}) if is_other else case.ours
    with tempfile.TemporaryDirectory() as name:
        train = str(inputs.write_rows(Path(name) / "train.jsonl", rows))
        given = ("--method", method, "--model", str(inputs.TINYSTORIES), "--train", train, "--lr", str(case.lr))
        given += ("--seed", str(seed), "--steps", str(steps))
        theirs = measure.run(
            [str(measure.PEER_PYTHON), str(measure.BENCH / "peer_trl_losses.py"), *given, "--config", json.dumps(case.theirs),
             "--batch", str(case.micro), "--accumulate", str(BATCH // case.micro)]
        )  # fmt: skip
        ours = measure.run(
            [sys.executable, str(measure.BENCH / "our_losses.py"), *given, "--loss", json.dumps(options), "--batch", str(BATCH)]
        )
    differing = sum(one != other for one, other in zip(theirs["ids"], ours["ids"], strict=True))
    gaps = [abs(one - other) for one, other in zip(theirs["losses"], ours["losses"], strict=True)]
    return Compared(differing, max(gaps), {"trl": theirs["losses"], "preftune": ours["losses"]})


def compare_all(train: Sequence[inputs.Row], seed: int, steps: int, tolerance: float) -> dict[str, dict[str, Any]]:
    """Every case, by loss."""
    found: dict[str, dict[str, Any]] = {}
    for method, case in CASES.items():
        rows = train[: BATCH * steps]
        done = compare(method, rows, seed, steps)
        found[method] = {
            "note": case.note,
            "steps": len(done.losses["trl"]),
            "rows_with_other_ids": done.rows_with_other_ids,
            "largest_gap": done.largest_gap,
            "is_equal": done.rows_with_other_ids == 0 and done.largest_gap <= tolerance,
            "losses": done.losses,
        }
        if case.other is not None:
            plain = compare(method, rows[:BATCH], seed, 1, is_other=True)
            found[method]["first_loss_otherwise"] = {key: values[0] for key, values in plain.losses.items()}
        measure.say(f"parity of {method}: {found[method]['steps']} steps, largest gap of a loss {done.largest_gap:.2g}")
    return found

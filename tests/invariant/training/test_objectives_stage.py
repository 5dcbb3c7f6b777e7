"""Losses of a whole step, of ties, of single tokens and of labels through a stage: the first loss by hand, then less."""

import json
import math
from dataclasses import replace

import pytest
from tiny import labelled, losses_of, make_examples, make_plan

from preftune.core.recipe import LoraConfig
from preftune.training.loop import run_stage
from preftune.training.order import Order

PAIRS = make_examples(8)
TIED = [replace(one, is_tie=at % 2 == 0) for at, one in enumerate(PAIRS)]
LABELS = labelled(PAIRS)
CHANGES = {"lora": LoraConfig(rank=4, alpha=8, dropout=0.0), "lr": 2e-2, "epochs": 6.0, "evals": 1, "checkpoints": 0}


def first_step(rows):
    return [rows[index] for index in Order(len(rows), 4, 0, True).indices(0)]


# at the start policy and reference are one, so every log-ratio is 0
START = {
    "aot": (PAIRS, lambda rows: math.log(2)),
    "aot_unpaired": (PAIRS, lambda rows: math.log(2)),
    "bco_pair": (PAIRS, lambda rows: 2 * math.log(2)),
    "apo_zero_unpaired": (LABELS, lambda rows: 0.5),
    "rao_kupper": (TIED, lambda rows: sum(math.log(2 if row.is_tie else 4) for row in rows) / len(rows)),
    "davidson": (TIED, lambda rows: sum(math.log(2 if row.is_tie else 4) for row in rows) / len(rows)),
    "wpo": (PAIRS, None),  # the weights are the model's own
}


@pytest.mark.parametrize("method", START)
def test_a_stage(tmp_path, tiny_model, method):
    rows, expected = START[method]
    select = (LABELS if method == "apo_zero_unpaired" else rows)[:4]
    result = run_stage(make_plan(tmp_path, tiny_model, rows, select, **CHANGES | {"method": method, "loss": {"beta": 0.3}}))
    losses = losses_of(tmp_path / "run")
    if expected is not None:
        assert losses[1] == pytest.approx(expected(first_step(rows)), abs=1e-5)
    assert len(losses) == 12
    assert losses[12] < losses[1] - 0.01
    assert math.isfinite(result.metrics["eval_loss"])
    kept = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("rewards/margins" in row for row in kept)

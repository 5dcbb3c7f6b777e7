"""KTO from labelled examples to weights: any order and batch size, partners once for all seeds, TRL's metric names."""

import json

import pytest
import torch
from tiny import labelled, losses_of, make_examples, make_plan

from preftune.core.events import StageStarted
from preftune.core.recipe import LoraConfig, ModelConfig
from preftune.data.pack import pack_step
from preftune.data.partners import with_partners
from preftune.maths.losses.base import losses
from preftune.modeling.adapters import add_lora, trainable_parameters
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model
from preftune.training.loop import run_stage
from preftune.training.step import Objective, counts_of

ROWS = with_partners(labelled(make_examples(12)), 64)
SELECT = with_partners(labelled(make_examples(6, 1, prefix="select")), 64)
CHANGES = {"method": "kto", "loss": {"beta": 0.3, "lambda_u": "auto"}, "checkpoints": 0, "epochs": 1.0, "evals": 1}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_and_what_it_says(tmp_path, tiny_model):
    result = run_stage(make_plan(tmp_path, tiny_model, ROWS, SELECT, **CHANGES))
    first = next(row for row in rows_of(tmp_path / "run") if "kl" in row)
    # every r and z0 are 0: each completion costs half its weight, and auto makes the sums of weights equal
    count = [sum(label is wanted for row in ROWS[:12] for label in row.labels) for wanted in (True, False)]
    assert first["kl"] == 0
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    assert {"logps/chosen", "logps/rejected"} <= set(first)
    assert first["loss"] == pytest.approx(
        sum(0.5 if label else 0.5 * count[0] / count[1] for row in step_one(tmp_path, tiny_model) for label in row.labels)
        / sum(len(row.labels) for row in step_one(tmp_path, tiny_model)),
        abs=1e-6,
    )
    assert {"eval_loss", "eval_kl", "eval_rewards/margins"} <= set(result.metrics)
    again = run_stage(make_plan(tmp_path, tiny_model, ROWS, SELECT, folder="again", seed=3, **CHANGES))
    assert again.reference_forwards == 0, "another order has the same partners"


def step_one(tmp_path, tiny_model):
    from preftune.training.order import Order

    return [ROWS[index] for index in Order(len(ROWS), 4, 0, True).indices(0)]


def test_a_batch_of_one_works(tmp_path, tiny_model):
    changes = CHANGES | {"pairs_per_step": 1, "lr": 1e-2}
    run_stage(make_plan(tmp_path, tiny_model, ROWS, SELECT, **changes))
    rows = [row for row in rows_of(tmp_path / "run") if "kl" in row]
    assert len(rows) == 12
    assert any(row["kl"] > 0 for row in rows)
    labels = {("rewards/chosen" in row, "rewards/rejected" in row) for row in rows}
    assert labels == {(True, True), (True, False), (False, True)}, "a label that a step lacks has no metric"


def test_training_tells_the_labels_apart(tmp_path, tiny_model):
    seen = []
    changes = CHANGES | {"epochs": 8.0, "lr": 1e-2, "pairs_per_step": 12, "loss": {"beta": 0.3}}
    run_stage(make_plan(tmp_path, tiny_model, ROWS, SELECT, **changes), seen.append)
    rows = [row for row in rows_of(tmp_path / "run") if "kl" in row]
    assert rows[-1]["rewards/margins"] > 0.3
    losses = losses_of(tmp_path / "run")
    assert losses[8] < losses[1]
    assert any(isinstance(event, StageStarted) and event.facts["method"] == "kto" for event in seen)


def test_rows_without_partners_are_refused(tmp_path, tiny_model):
    with pytest.raises(ValueError, match="has no partner"):
        run_stage(make_plan(tmp_path, tiny_model, labelled(make_examples(4)), [], **CHANGES))


def test_partners_are_scored_without_dropout_and_without_a_graph(tiny_model):
    model = add_lora(load_model(ModelConfig(name=str(tiny_model)), precision="float32").model, LoraConfig(rank=4, dropout=0.5), 0)
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.05
    objective = Objective(Scorer(model), losses.build("kto"), None)
    packs = pack_step(ROWS[:6], 64)
    model.train()
    found = [objective.mismatched(packs).policy for _ in range(2)]
    assert torch.equal(*found)
    assert not found[0].requires_grad
    assert model.training, "the model is put back as it was"
    assert not torch.equal(*(objective.scorer.token_logps(packs[0]) for _ in range(2))), "and its dropout is on"


def test_what_a_step_counts():
    packs = pack_step(ROWS, 64)
    counts = counts_of(packs)
    assert counts["pair"] == len(ROWS)
    assert counts["completion"] == sum(len(row.labels) for row in ROWS)
    assert counts["token"] == sum(one.num_scored for row in ROWS for one in row.completions)
    assert counts["chosen_token"] == sum(row.completions[0].num_scored for row in ROWS) < counts["token"]

"""A real small model with tied embeddings on real pairs: file to final weights through the real rooms."""

import math
import os
import signal

import pytest
from tiny import losses_of

from preftune.core.errors import Interrupted
from preftune.core.events import StepDone
from preftune.core.recipe import ModelConfig, StageConfig
from preftune.data.pipeline import read_examples
from preftune.data.split import split_by_prompt
from preftune.data.tokenize import tokenise
from preftune.modeling.load import load_model
from preftune.training.loop import run_stage
from preftune.training.state import StagePlan


@pytest.fixture(scope="module")
def plan_of(shared_data, tmp_path_factory):
    work = tmp_path_factory.mktemp("real")
    model = ModelConfig(name=str(shared_data / "models" / "tinystories-656k" / "hf"), chat_template="plain")
    rows = read_examples([str(shared_data / "rasbt-preference" / "instruction-data-with-preference.json")], limit=120).examples
    train, select = split_by_prompt(rows, 0.2, 0)

    def plan(folder, method="dpo", *, resume=False, **changes):
        loaded = load_model(model, precision="float32")
        view = "demonstrations" if method == "sft" else "pairs"
        train_rows, select_rows = (
            tokenise(part, loaded.tokenizer, view=view, max_length=512, too_long="exclude").examples for part in (train, select)
        )
        config = {"pairs_per_step": 8, "epochs": 1.0, "lr": 3e-4, "warmup": 0.0, "adapter": "full", "evals": 2} | changes
        stage = StageConfig(name=folder, method=method, **config)
        return StagePlan(stage, loaded, train_rows, select_rows, work / folder, 0, "digest", work / "cache", resume)

    return plan


def test_dpo_on_real_pairs(plan_of):
    result = run_stage(plan_of("dpo"))
    rows = losses_of(result.folder)
    assert rows[1] == pytest.approx(math.log(2), abs=1e-7)
    assert rows[result.steps] < 0.6
    assert result.metrics["eval_rewards/accuracies"] > 0.55
    assert result.metrics["eval_loss"] < math.log(2)
    assert run_stage(plan_of("again", lr=1e-4)).reference_forwards == 0


def test_sft_on_real_rows(plan_of):
    result = run_stage(plan_of("sft", "sft", epochs=2.0))
    rows = losses_of(result.folder)
    assert rows[result.steps] < rows[1]


def test_tied_weights_resume_bit_for_bit(plan_of):
    whole = run_stage(plan_of("whole", loss={"rpo_alpha": 0.2}))

    def stop(event):
        if isinstance(event, StepDone) and event.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_stage(plan_of("stopped", loss={"rpo_alpha": 0.2}), stop)
    resumed = run_stage(plan_of("stopped", loss={"rpo_alpha": 0.2}, resume=True))
    assert resumed.resumed_from == 5
    assert losses_of(resumed.folder) == losses_of(whole.folder)
    assert (resumed.final / "model.safetensors").read_bytes() == (whole.final / "model.safetensors").read_bytes()

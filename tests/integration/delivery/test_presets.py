"""The shipped recipes have the published numbers, and each one trains."""

import pytest

from preftune.app.presets import list_presets
from preftune.app.recipes import load_recipe
from preftune.app.train import train
from preftune.core.errors import RecipeError, UsageError

# typed from the sources: method, options, adapter, lr, pairs a step, epochs, longest row, schedule, warm-up
PUBLISHED = {
    "zephyr-dpo-full": ("dpo", {"beta": 0.01}, "full", 5e-7, 128, 1, 1024, "cosine", 0.1),
    "zephyr-dpo-lora": ("dpo", {"beta": 0.01}, "lora", 5e-6, 128, 1, 1024, "cosine", 0.1),
    "tulu3-dpo-norm": ("dpo", {"beta": 5, "length_normalised": True}, "full", 5e-7, 128, 1, 2048, "linear", 0.1),
    "olmo2-dpo-norm": ("dpo", {"beta": 5, "length_normalised": True}, "full", 1e-6, 128, 1, 2048, "linear", 0.1),
    "simpo-llama3-instruct": ("simpo", {"beta": 2.5, "gamma": 0.55 * 2.5}, "full", 1e-6, 128, 1, 2048, "cosine", 0.1),
    "simpo-mistral-base": ("simpo", {"beta": 2.0, "gamma": 0.8 * 2.0}, "full", 3e-7, 128, 1, 1024, "cosine", 0.1),
    "orpo": ("orpo", {"lambda_or": 0.05, "nll_scope": "prompt_and_answer"}, "full", 5e-6, 32, 3, 2048, "linear", 0.1),
    "kto": ("kto", {"beta": 0.1}, "full", 1e-6, 16, 1, 1024, "linear", 0.1),
    "together-dpo-default": ("dpo", {"beta": 0.1}, "lora", 1e-5, 16, 1, None, "cosine", 0),
    "trl-default": ("dpo", {"beta": 0.1}, "full", 1e-6, 8, 3, 1024, "linear", 0),
    "dpo-paper": ("dpo", {"beta": 0.1}, "full", 5e-7, 64, 1, 512, "constant", 0.05),
    "zephyr-gemma-dpo": ("dpo", {"beta": 0.05}, "full", 5e-7, 128, 2, 1024, "cosine", 0.1),
    "smollm2-dpo": ("dpo", {"beta": 0.5}, "full", 1e-6, 128, 2, 1024, "cosine", 0.1),
    "smollm3-apo-zero": ("apo_zero", {"beta": 0.05}, "full", 1e-6, 16, 1, 24576, "cosine", 0.1),
    "constitutional-ai-dpo": ("dpo", {"beta": 0.1}, "full", 5e-7, 16, 3, 1024, "linear", 0.1),
    "handbook-ipo": ("ipo", {"tau": 0.1, "length_normalised": True}, "full", 5e-7, 128, 1, 1024, "cosine", 0.1),
    "tulu3-70b-dpo-norm": ("dpo", {"beta": 5, "length_normalised": True}, "full", 2e-7, 128, 1, 2048, "linear", 0.1),
    "olmo2-1b-dpo-norm": ("dpo", {"beta": 5, "length_normalised": True}, "full", 2.5e-6, 128, 1, 2048, "linear", 0.1),
    "olmo3-think-dpo-norm": ("dpo", {"beta": 5, "length_normalised": True}, "full", 8e-8, 128, 1, 16384, "linear", 0.1),
    "simpo-mistral-instruct": ("simpo", {"beta": 2.5, "gamma": 0.1 * 2.5}, "full", 5e-7, 128, 1, 2048, "cosine", 0.1),
    "simpo-llama3-base": ("simpo", {"beta": 2.0, "gamma": 0.5 * 2.0}, "full", 6e-7, 128, 1, 2048, "cosine", 0.1),
    "simpo-llama3-instruct-v0.2": ("simpo", {"beta": 10, "gamma": 0.3 * 10}, "full", 1e-6, 128, 1, 2048, "cosine", 0.1),
    "simpo-gemma2": ("simpo", {"beta": 10, "gamma": 0.5 * 10}, "full", 8e-7, 128, 1, 2048, "cosine", 0.1),
    "simpo-paper-dpo": ("dpo", {"beta": 0.01}, "full", 5e-7, 128, 1, 2048, "cosine", 0.1),
    "llama-factory-dpo-lora": ("dpo", {"beta": 0.1}, "lora", 5e-6, 8, 3, 2048, "cosine", 0.1),
    "ms-swift-dpo-lora": ("dpo", {"beta": 0.1, "rpo_alpha": 0.1}, "lora", 1e-4, 16, 1, 2048, "cosine", 0.05),
    "openrlhf-dpo": ("dpo", {"beta": 0.1}, "full", 5e-7, 256, 1, 8192, "cosine", 0.03),
    "nemo-rl-dpo": ("dpo", {"beta": 0.05}, "full", 5e-6, 128, 1, 1024, "constant", 0.133),
}


def test_every_preset_is_in_the_table():
    assert [row["name"] for row in list_presets()] == sorted(PUBLISHED)
    assert all(len(row["what"]) > 20 for row in list_presets())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_has_the_published_numbers_and_trains(name, tmp_path, starter_model):
    given = [f"data={starter_model.parent / 'pairs.jsonl'}", "model=starter"]
    (stage,) = load_recipe(f"preset:{name}", given).stages
    loss = {key: pytest.approx(value) if isinstance(value, float) else value for key, value in stage.loss.items()}
    size = (stage.pairs_per_step, stage.epochs, stage.data.max_length)
    found = (stage.method, loss, stage.adapter, stage.lr, *size, stage.schedule, stage.warmup)
    assert PUBLISHED[name] == found
    small = ["data.limit=8", "data.max_length=512", "max_steps=2", "pairs_per_step=4", "probe=off", "evals=0", "checkpoints=0"]
    small += [f"output={tmp_path}"]
    done = train(load_recipe(f"preset:{name}", [*given, *small]), probe="off")
    assert done.stages[0]["steps"] == 2
    assert done.model.is_dir()


def test_a_preset_needs_a_model_and_data_and_a_name_that_exists():
    with pytest.raises(RecipeError, match="model=MODEL data=FILE"):
        load_recipe("preset:kto", ["model=starter"])
    with pytest.raises(UsageError, match="did you mean 'kto'"):
        load_recipe("preset:ktoo")

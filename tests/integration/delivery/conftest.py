"""A run of the starter whose adapter moved far enough that a wrong merge shows."""

import pytest

from preftune.app.recipes import make_recipe
from preftune.app.train import train


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory, starter_model):
    folder = tmp_path_factory.mktemp("delivery")
    given = {
        "name": "tiny", "model": "starter", "method": "dpo", "beta": 0.1, "lr": 2e-2, "max_steps": 3, "pairs_per_step": 4,
        "data": {"train": str(starter_model.parent / "pairs.jsonl"), "limit": 24}, "probe": "off", "evals": 0,
        "output": str(folder / "runs"),
    }  # fmt: skip
    return train(make_recipe(given, folder), probe="off")

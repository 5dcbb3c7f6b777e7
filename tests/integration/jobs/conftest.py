"""An installation of its own with a real worker and the starter model."""

import time
from importlib.resources import files
from pathlib import Path

import pytest

from preftune.app.context import Context
from preftune.app.jobs import states
from preftune.app.jobs.files import receive
from preftune.app.jobs.models import add_base_model
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.app.jobs.worker import Worker
from preftune.store.records import Job, new_id

STARTER = Path(str(files("preftune"))) / "starter"


@pytest.fixture
def platform(tmp_path):
    opened = Platform.open(Context(tmp_path / "cache", tmp_path / "home"))
    add_base_model(opened, "starter", "starter")
    yield opened
    opened.store.close()


@pytest.fixture
def project(platform):
    return platform.project(DEFAULT_PROJECT).id


@pytest.fixture
def pairs(platform, project):
    rows = (STARTER / "pairs.jsonl").read_bytes().splitlines(keepends=True)[:24]
    return receive(platform, project, "pairs.jsonl", "fine-tune", rows)


@pytest.fixture
def submit(platform, project, pairs):
    def call(**changes):
        stage = {
            "method": "dpo",
            "beta": 0.1,
            "lr": 1e-4,
            "adapter": "full",
            "pairs_per_step": 4,
            "max_steps": 3,
            "checkpoints": 2,
            "probe": {"prompts": 4, "max_new_tokens": 16},
        }
        stage |= changes.pop("stage", {}) | {"data": {"train": [pairs.id]}}
        recipe = {"model": {"name": "starter"}, "stages": [stage]}
        job = Job(
            id=new_id("ft-"), project=project, work="train", model="starter", name="tuned", files=(pairs.id,), recipe=recipe
        )
        return states.submit(platform, job.model_copy(update=changes))

    return call


@pytest.fixture
def worker(platform):
    made = Worker(platform, slots=1, lease=3.0)
    yield made
    made.stop()


@pytest.fixture
def until():
    def call(worker, condition, seconds=180):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            if not worker.tick():
                time.sleep(0.05)

    return call

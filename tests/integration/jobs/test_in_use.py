"""What a job that has not ended needs is not deleted under it; afterwards it is."""

import pytest

from preftune.app.jobs import files, states
from preftune.app.jobs.models import delete_model, find_model, list_models, start_of
from preftune.core.errors import UsageError
from preftune.store.base import Query
from preftune.store.records import File, Job, ModelVersion, new_id


@pytest.fixture
def tuned(platform, project):
    """A finished job with a checkpoint of step 2 and its end, step 4."""
    job = platform.store.insert(Job(id=new_id("ft-"), project=project, work="train", status="succeeded", name="tuned-1"))
    for name, step in (("tuned-1:2", 2), ("tuned-1", 4)):
        platform.store.insert(
            ModelVersion(
                id=new_id("ml_"), project=project, name=name, version=1, form="full", job=job.id, step=step, run=f"/runs/{step}"
            )
        )
    return job


def test_a_file_that_is_read_stays(platform, submit, pairs):
    job = submit()
    with pytest.raises(states.WrongState, match=rf"file {pairs.id} is read by job {job.id}, which is validating; cancel"):
        files.delete(platform, pairs)
    assert platform.store.get(File, pairs.id) is not None
    assert platform.artifacts.exists(pairs.artifact)
    states.cancel(platform, job)
    files.delete(platform, pairs)
    assert platform.store.get(File, pairs.id) is None
    assert not platform.artifacts.exists(pairs.artifact)


def test_a_file_that_is_only_validated_may_go(platform, pairs, worker):
    files.delete(platform, pairs)
    worker.tick()
    (job,) = platform.store.page(Job, Query(None, {"work": "validate"})).items
    assert job.status == "failed"
    assert "was deleted" in job.error["message"]


@pytest.mark.parametrize("named", ["{job}:4", "{job}", "tuned-1", "tuned-1:4"])
def test_the_end_of_a_run_has_its_step_too(platform, project, tuned, named):
    assert start_of(platform, project, named.format(job=tuned.id)).run == "/runs/4"


def test_checkpoints_are_named_by_step_and_others_are_not_there(platform, project, tuned):
    assert start_of(platform, project, f"{tuned.id}:2").run == start_of(platform, project, "tuned-1:2").run == "/runs/2"
    assert find_model(platform, project, "tuned-1:4").run == "/runs/4"
    for wrong in ("tuned-1:3", "tuned-1:", "tuned:4", ":4"):
        with pytest.raises(UsageError, match="there is no model"):
            start_of(platform, project, wrong)


@pytest.mark.parametrize("named", ["{job}:2", "tuned-1:2"])
def test_a_model_that_a_job_begins_from_stays(platform, project, submit, tuned, named):
    job = submit()
    recipe = {**job.recipe, "stages": [{**job.recipe["stages"][0], "from_checkpoint": named.format(job=tuned.id)}]}
    platform.store.change(Job, job.id, {"recipe": recipe})
    with pytest.raises(states.WrongState, match=f"is where job {job.id} begins"):
        delete_model(platform, find_model(platform, project, "tuned-1:2"))
    delete_model(platform, find_model(platform, project, "tuned-1"))
    states.cancel(platform, job)
    delete_model(platform, find_model(platform, project, "tuned-1:2"))
    assert platform.store.count(ModelVersion, Query(project, {"job": tuned.id})) == 0


def test_a_list_of_models_has_no_end_at_a_page(platform, project, monkeypatch):
    from preftune.app.jobs import models

    monkeypatch.setattr(models, "PAGE", 2)
    for number in range(5):
        platform.store.insert(ModelVersion(id=f"ml_{number}", project=project, name=f"m{number}", version=1, form="full"))
    listed = [model.name for model in list_models(platform, project)]
    assert sorted(listed) == ["m0", "m1", "m2", "m3", "m4", "starter"]

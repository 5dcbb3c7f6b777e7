"""A backup taken beside a running job, restored elsewhere: everything is there, and the job ends as it would have ended."""

import hashlib
import tarfile

import pytest

from preftune.app.backup import MANIFEST, backup, restore
from preftune.app.context import Context
from preftune.app.jobs.platform import Platform
from preftune.app.jobs.worker import Worker
from preftune.core.errors import InputError, PreftuneError
from preftune.store.artifacts import Artifacts
from preftune.store.base import Query
from preftune.store.opening import open_store
from preftune.store.records import File, Job, ModelVersion


def weights_of(platform, job):
    path = platform.home / "jobs" / job.id / "run/stages/1-dpo/final/model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_running_job_is_backed_up_and_completes_elsewhere(tmp_path, platform, project, submit, worker, until, pairs):
    done = submit(stage={"epochs": 4, "max_steps": 8, "checkpoints": 4}, name="first")
    until(worker, lambda: platform.store.get(Job, done.id).status == "succeeded")
    job = submit(stage={"epochs": 4, "max_steps": 8, "checkpoints": 4}, name="second")
    until(worker, lambda: platform.store.get(Job, job.id).progress.get("step", 0) >= 2)
    path = tmp_path / "state.tar"
    made = backup(platform, path)
    assert made.missing == ()
    assert not list(platform.home.rglob(".writing-*/run.json")), "what was held for the copy is let go"
    until(worker, lambda: platform.store.get(Job, job.id).status == "succeeded")

    context = Context(tmp_path / "cache2", tmp_path / "home2")
    store, artifacts, home = Platform.places(context)
    assert restore(path, store, artifacts, home).records == made.records
    store.close()
    again = Platform.open(context)
    assert again.store.get(File, pairs.id) == platform.store.get(File, pairs.id)
    assert b"".join(again.artifacts.read(pairs.artifact)) == b"".join(platform.artifacts.read(pairs.artifact))
    first = again.store.page(ModelVersion, Query(project, {"name": "first"})).items[0]
    assert str(home) in first.run
    assert weights_of(again, done) == weights_of(platform, done)
    assert again.store.get(Job, job.id).status == "queued"
    other = Worker(again, slots=1, lease=3.0)
    until(other, lambda: again.store.get(Job, job.id).status in {"succeeded", "failed"})
    assert again.store.get(Job, job.id).status == "succeeded", again.store.get(Job, job.id).error
    assert weights_of(again, job) == weights_of(platform, job)
    with pytest.raises(PreftuneError, match="not empty"):
        restore(path, again.store, again.artifacts, home)
    again.store.close()


def test_a_damaged_or_cut_backup_changes_nothing(tmp_path, platform, pairs):
    path = tmp_path / "state.tar"
    backup(platform, path)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        names = archive.getnames()
        at = archive.getmember(next(name for name in names if name.startswith("artifacts/"))).offset_data
    assert names[-1] == MANIFEST
    bad = {
        "flipped": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "other": b"x",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        store = open_store(f"sqlite:///{tmp_path}/{name}.db")
        with pytest.raises(InputError, match=r"damaged|cut|cannot be read"):
            restore(tmp_path / name, store, Artifacts(str(tmp_path / f"{name}-artifacts")), tmp_path / f"{name}-home")
        assert not list(store.dump())
        store.close()


def test_a_member_that_leads_out_is_refused(tmp_path):
    import io

    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("jobs/../../escaped")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    store = open_store(f"sqlite:///{tmp_path}/e.db")
    with pytest.raises(InputError, match="leads out"):
        restore(path, store, Artifacts(str(tmp_path / "a")), tmp_path / "home")
    store.close()
    assert not (tmp_path / "escaped").exists()

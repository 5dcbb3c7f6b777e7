"""gc of an installation: real folders and artifacts, a real SQLite store; what is named or may go on is never touched."""

import os
import time

import pytest
from click.testing import CliRunner

from preftune.app.context import Context
from preftune.app.gc import Policy, collect
from preftune.app.holding import hold
from preftune.app.jobs import files, states
from preftune.app.jobs.platform import Platform
from preftune.cli.main import cli
from preftune.store.records import Job, ModelVersion, Upload, new_id, now

OLD = time.time() - 3 * 86_400


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("PREFTUNE_DATABASE", "PREFTUNE_ARTIFACTS", "PREFTUNE_SERVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFTUNE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    return Context(tmp_path / "cache", tmp_path / "state")


@pytest.fixture
def platform(place):
    with Platform.open(place) as made:
        yield made


def job_of(platform, status="succeeded", task="{}"):
    """A job with a folder of 1,000 bytes."""
    project = platform.project("default").id
    job = platform.store.insert(Job(id=new_id("ft-"), project=project, work="train", status=status, model="starter", name="m"))
    folder = platform.job_folder(job.id)
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "weights").write_bytes(b"0" * 1000)
    (folder / "task.json").write_text(task)
    return job, folder


def model_of(platform, job, folder, **changes):
    facts = {"name": f"of-{job.id[3:7]}", "version": 1, "form": "full", "job": job.id, "run": str(folder / "run"), **changes}
    return platform.store.insert(ModelVersion(id=new_id("ml_"), project=job.project, **facts))


def found(place, output, *, is_deleting=False):
    result = collect(output, Policy(), place, is_deleting=is_deleting)
    return {str(one.path): one for one in result.found if one.kind in {"job", "artifact"}}, result


@pytest.mark.parametrize("status", ["validating", "queued", "running", "exporting", "paused", "failed", "cancelled", "succeeded"])
def test_a_job_that_was_not_deleted_keeps_its_folder(platform, place, tmp_path, status):
    _, folder = job_of(platform, status)
    doomed, gone = job_of(platform)
    states.delete(platform, doomed)
    assert list(found(place, tmp_path, is_deleting=True)[0]) == [str(gone)]
    assert (folder / "run" / "weights").is_file()
    assert not gone.exists()


def test_a_dry_run_says_how_much_and_deletes_nothing(platform, place, tmp_path):
    job, folder = job_of(platform)
    states.delete(platform, job)
    rows, result = found(place, tmp_path)
    assert rows[str(folder)].num_bytes == 1002
    assert rows[str(folder)].reason == "its job was deleted"
    assert not result.is_deleted
    said = CliRunner().invoke(cli, ["gc", "--output", str(tmp_path / "runs")])
    assert said.exit_code == 0
    assert f"job         {folder}" in said.output
    assert "1.0 kB" in said.output
    assert folder.is_dir()
    CliRunner().invoke(cli, ["gc", "--output", str(tmp_path / "runs"), "--yes"], catch_exceptions=False)
    assert not folder.exists()


def test_models_keep_their_deleted_job(platform, place, tmp_path):
    """Also where only an adapter on them is left, and where a job that may be retried starts from there."""
    base, base_folder = job_of(platform)
    below = model_of(platform, base, base_folder)
    top, top_folder = job_of(platform)
    above = model_of(platform, top, top_folder, base=below.id, parent=below.id)
    start, start_folder = job_of(platform)
    retryable, _ = job_of(platform, "failed", f'{{"recipe": {{"model": "{start_folder}/run"}}}}')
    for job in (base, top, start):
        states.delete(platform, job)
    platform.store.change(ModelVersion, below.id, {"deleted_at": now()})
    rows, result = found(place, tmp_path)
    assert rows == {}
    assert sum("its models stay" in line for line in result.kept) == 2
    assert sum("starts from it" in line for line in result.kept) == 1
    platform.store.change(ModelVersion, above.id, {"deleted_at": now()})
    states.delete(platform, retryable)
    assert len(found(place, tmp_path)[0]) == 4


def test_a_folder_in_use_or_new_without_a_record_stays(platform, place, tmp_path):
    job, folder = job_of(platform)
    states.delete(platform, job)
    stray = platform.job_folder("ft-nobody")
    stray.mkdir()
    with hold(folder / "run"):
        rows, result = found(place, tmp_path)
    assert rows == {}
    assert any("in use by process" in line for line in result.kept)
    os.utime(stray, (OLD, OLD))
    assert sorted(found(place, tmp_path)[0]) == sorted([str(folder), str(stray)])


def test_artifacts_that_no_record_names(platform, place, tmp_path):
    project = platform.project("default").id
    named = files.receive(platform, project, "pairs.jsonl", "fine-tune", [b'{"prompt": "a"}\n'])
    platform.artifacts.put("uploads/part", [b"12"])
    upload = {"filename": "x.jsonl", "purpose": "p", "bytes": 2, "parts": {"1": {"key": "uploads/part"}}}
    platform.store.insert(Upload(id=new_id("upload_"), project=project, **upload))
    job, folder = job_of(platform)
    model = model_of(platform, job, folder)
    for key in (f"exports/{model.id}/merged.tar.gz", "files/stray.jsonl", "files/young.jsonl"):
        platform.artifacts.put(key, [b"123456"])
    root = place.state / "artifacts"
    for path in (one for one in root.rglob("*") if one.is_file() and one.name != "young.jsonl"):
        os.utime(path, (OLD, OLD))
    rows, _ = found(place, tmp_path, is_deleting=True)
    assert {key: one.num_bytes for key, one in rows.items()} == {"files/stray.jsonl": 6}
    assert not platform.artifacts.exists("files/stray.jsonl")
    for key in (named.artifact, "uploads/part", f"exports/{model.id}/merged.tar.gz", "files/young.jsonl"):
        assert platform.artifacts.exists(key)
    platform.store.change(ModelVersion, model.id, {"deleted_at": now()})
    assert list(found(place, tmp_path)[0]) == [f"exports/{model.id}/merged.tar.gz"]


def test_another_database_deletes_nothing(platform, place, tmp_path, monkeypatch):
    _, folder = job_of(platform)
    files.receive(platform, platform.project("default").id, "pairs.jsonl", "fine-tune", [b'{"prompt": "a"}\n'])
    for path in (*folder.rglob("*"), folder, *(place.state / "artifacts").rglob("*")):
        os.utime(path, (OLD, OLD))
    monkeypatch.setenv("PREFTUNE_DATABASE", f"sqlite:///{tmp_path / 'other.db'}")
    rows, result = found(place, tmp_path, is_deleting=True)
    assert rows == {}
    assert sum("is it the right one?" in line for line in result.kept) == 2
    assert folder.is_dir()


def test_looking_makes_no_database(place, tmp_path):
    collect(tmp_path, Policy(), place)
    assert not (place.state / "preftune.db").exists()

"""gc: finds what may go, says why, deletes only when told, and leaves alone what matters or is in use."""

import json
import os
import subprocess
import sys
import time

import pytest

from preftune.app.context import Context
from preftune.app.gc import Policy, collect
from preftune.app.holding import hold, holders
from preftune.app.runs import RunFolder

OLD = time.time() - 100 * 86_400


def age(path):
    for one in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(one, (OLD, OLD))


def checkpoint(run, step):
    folder = run.stage_folder(0, "dpo") / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "optimizer.safetensors").write_bytes(b"0" * 1000)
    return folder


@pytest.fixture
def place(tmp_path):
    return Context(tmp_path / "cache", tmp_path / "state")


@pytest.fixture
def stopped(tmp_path):
    run = RunFolder.create(tmp_path / "runs", "stopped")
    run.update({"status": "interrupted"})
    for step in (10, 20, 30):
        checkpoint(run, step)
    (run.stage_folder(0, "dpo") / "metrics.jsonl").write_text("{}\n")
    return run


def found(tmp_path, place, policy=None, **options):
    return {one.path.name: one for one in collect(tmp_path / "runs", policy or Policy(), place, **options).found}


def test_nothing_to_collect(tmp_path, place):
    assert found(tmp_path, place) == {}


def test_old_checkpoints_of_an_unfinished_run(tmp_path, place, stopped):
    assert set(found(tmp_path, place)) == {"step-000010", "step-000020"}
    assert all((stopped.path / "stages/1-dpo/checkpoints" / f"step-0000{step}").is_dir() for step in (10, 20, 30)), "a dry run"
    collect(tmp_path / "runs", Policy(), place, is_deleting=True)
    left = sorted(path.name for path in (stopped.path / "stages/1-dpo").rglob("*"))
    assert left == ["checkpoints", "manifest.json", "metrics.jsonl", "optimizer.safetensors", "step-000030"]


def test_a_run_that_succeeded_keeps_everything(tmp_path, place, stopped):
    stopped.update({"status": "succeeded"})
    assert found(tmp_path, place) == {}


def test_what_a_running_process_holds_is_left_alone(tmp_path, place, stopped):
    stopped.update({"status": "running"})
    with hold(stopped.path, place.cache):
        collection = collect(tmp_path / "runs", Policy(), place)
        assert collection.found == []
        assert any(f"in use by process {os.getpid()}" in text for text in collection.kept)
        assert holders(stopped.path)
    assert not holders(stopped.path)
    assert set(found(tmp_path, place)) == {"step-000010", "step-000020"}, "a run that says running and has no process crashed"


def test_a_process_that_died_holds_nothing(tmp_path, place, stopped):
    code = (
        "import os, sys, pathlib; from preftune.app.holding import hold\nwith hold(pathlib.Path(sys.argv[1])):\n    os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(stopped.path)], check=False)
    assert list(stopped.path.glob(".held-by/*.json")), "its word is still there"
    assert holders(stopped.path) == []
    assert set(found(tmp_path, place)) == {"step-000010", "step-000020"}


def test_a_number_that_another_process_took_over_is_not_believed(tmp_path):
    with hold(tmp_path):
        (file,) = tmp_path.glob(".held-by/*.json")
        said = json.loads(file.read_text())
        file.write_text(json.dumps({**said, "started": said["started"] - 5}))
        assert holders(tmp_path) == []


def test_leftovers_of_a_crash(tmp_path, place, stopped):
    half, fresh = stopped.path / "stages/1-dpo/.writing-abc", stopped.path / ".writing-new"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"0" * 10)
    fresh.write_text("")
    age(half)
    names = set(found(tmp_path, place))
    assert ".writing-abc" in names
    assert ".writing-new" not in names, "it may be under way"


def test_caches_by_age_and_size(tmp_path, place):
    for name, size in (("a", 3_000_000), ("b", 2_000_000), ("c", 1_000_000)):
        folder = place.reference_cache / name
        folder.mkdir(parents=True)
        (folder / "x.logps").write_bytes(b"0" * size)
    times = {"a": time.time() - 3000, "b": time.time() - 2000, "c": time.time() - 1000}
    for name, when in times.items():
        for path in (place.reference_cache / name, place.reference_cache / name / "x.logps"):
            os.utime(path, (when, when))
    assert found(tmp_path, place) == {}
    assert set(found(tmp_path, place, Policy(max_reference_gb=0.0025))) == {"a", "b"}, "oldest first, until the rest fits"
    age(place.reference_cache / "b")
    assert set(found(tmp_path, place)) == {"b"}
    probe = place.cache / "probes" / "k.json"
    probe.parent.mkdir()
    probe.write_text("{}")
    age(probe)
    assert set(found(tmp_path, place)) == {"b", "k.json"}

"""Run folders: never reused, found by name or path, and what from_checkpoint means."""

import pytest

from preftune.app.runs import RunFolder, find_model, list_runs
from preftune.app.show import show_run
from preftune.core.errors import CheckpointError, InputError, UsageError


@pytest.fixture
def run(tmp_path):
    made = RunFolder.create(tmp_path, "my run/1")
    stage = made.stage_folder(0, "dpo")
    for step in (2, 4):
        folder = stage / "checkpoints" / f"step-{step:06d}"
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").touch()
        (folder / "manifest.json").touch()
    (stage / "final").mkdir()
    (stage / "final" / "config.json").touch()
    return made


def test_names_are_safe_and_never_reused(run, tmp_path):
    assert run.path.name.startswith("my-run-1-")
    assert RunFolder.create(tmp_path, "my run/1").path != run.path
    assert len(list_runs(tmp_path)) == 2


def test_a_checkpoint_is_named_by_run_step_or_folder(run, tmp_path):
    stage = run.stage_folder(0, "dpo")
    assert find_model(run.path.name, tmp_path) == stage / "final"
    assert find_model(str(run.path), tmp_path) == stage / "final"
    assert find_model(f"{run.path.name}@2", tmp_path) == stage / "checkpoints" / "step-000002" / "model"
    assert find_model(str(stage / "checkpoints" / "step-000004"), tmp_path).name == "model"
    assert find_model(str(stage / "final"), tmp_path) == stage / "final"
    (stage / "result.json").write_text('{"steps": 6, "kept_step": 6}', encoding="utf-8")
    assert find_model(f"{run.path.name}@6", tmp_path) == stage / "final"
    (stage / "result.json").write_text('{"steps": 6, "kept_step": 4}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="no checkpoint of step 6; there is 2, 4"):
        find_model(f"{run.path.name}@6", tmp_path)  # final holds the best weights, not the last ones
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there is 2, 4"):
        find_model(f"{run.path.name}@3", tmp_path)
    with pytest.raises(CheckpointError, match="no run or folder"):
        find_model("nothing", tmp_path)


def test_records_change_field_by_field(run):
    run.update_stage(0, {"name": "dpo", "status": "running"})
    run.update_stage(0, {"status": "succeeded"})
    assert run.read()["stages"] == [{"name": "dpo", "status": "succeeded"}]
    (run.path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        run.read()


def test_an_unknown_run_lists_the_nearest(run, tmp_path):
    with pytest.raises(UsageError, match="did you mean"):
        RunFolder.open(run.path.name[:-1], tmp_path)


def test_a_run_that_stopped_shows_no_stage_as_running_and_how_it_goes_on(run):
    run.update_stage(0, {"name": "dpo", "status": "running"})
    (run.stage_folder(0, "dpo") / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n')
    assert "stage dpo  running  3 steps  loss 0.5" in show_run(run.path.name, run.path.parent).summary()
    for status in ("failed", "interrupted"):
        run.update({"status": "running", "error": None})
        run.update_stage(0, {"status": "running"})
        run.stop(status, error="a reason")
        lines = show_run(run.path.name, run.path.parent).summary()
        assert f"stage dpo  {status}  3 steps  loss 0.5" in lines
        assert f"its last checkpoint is whole; `preftune train --resume {run.path}` goes on from it" in lines
    RunFolder(run.path, is_ours=False).stop("succeeded")
    assert run.read()["status"] == "interrupted"

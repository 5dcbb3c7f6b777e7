"""A run that was killed and resumed is the run that never stopped, bit for bit; and what makes it so is shown to matter."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import losses_of, make_examples, make_plan

from preftune.core.errors import CheckpointError, Interrupted
from preftune.core.events import CheckpointSaved, Noted, StageStarted, StepDone
from preftune.core.files import read_json, read_jsonl
from preftune.modeling import compile as compile_module
from preftune.training import resume as resume_module
from preftune.training.checkpoint import latest, load_checkpoint, steps_in
from preftune.training.loop import run_stage

SCRIPT = Path(__file__).parent / "tiny.py"
ROWS = make_examples(22)  # 6 steps an epoch, 12 in two: checkpoints after 3 (mid-epoch), 6 and 9 (mid-epoch)


def content_of(file):
    """Tensors as bytes; JSON with its lists sorted, because PEFT writes sets."""
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        tensors.pop("python/words", None)  # the shape checks of the tests draw from this one, and only in the tests' process
        return {name: (str(one.dtype), one.shape, one.reshape(-1).view(torch.uint8).tolist()) for name, one in tensors.items()}
    if file.suffix == ".json":
        return json.loads(
            file.read_text(),
            object_hook=lambda one: {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in one.items()},
        )
    return file.read_bytes()


def files_of(folder):
    """What is left of a run, but for its times."""
    files = [file for part in ("final", "checkpoints") for file in sorted((folder / part).rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): content_of(file) for file in files if file.name != "manifest.json"}


def killed_in_a_process_of_its_own(work, step, **options):
    """Run a stage whose process is killed by SIGKILL as soon as this step is done."""
    command = [
        sys.executable,
        str(SCRIPT),
        str(work),
        f"die={step}",
        *(f"{key}={json.dumps(value)}" for key, value in options.items()),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_sigkill_in_mid_epoch_then_resume(tmp_path, tiny_model, adapter):
    (tmp_path / "model").symlink_to(tiny_model)
    kill = random.Random(adapter).choice([4, 5])  # in mid-epoch, between the checkpoints of steps 3 and 6
    run_stage(make_plan(tmp_path, tmp_path / "model", ROWS, folder="whole", adapter=adapter))
    killed_in_a_process_of_its_own(tmp_path, kill, folder="killed", adapter=adapter, count=22)
    assert steps_in(tmp_path / "killed" / "checkpoints") == [3]
    assert max(losses_of(tmp_path / "killed")) == kill
    result = run_stage(make_plan(tmp_path, tmp_path / "model", ROWS, folder="killed", adapter=adapter, resume=True))
    assert (result.resumed_from, result.steps, result.reference_forwards) == (3, 12, 0)
    expected, got = losses_of(tmp_path / "whole"), losses_of(tmp_path / "killed")
    assert [got[step] for step in range(4, 9)] == [expected[step] for step in range(4, 9)], "the next five losses"
    assert got == expected
    after, before = files_of(tmp_path / "killed"), files_of(tmp_path / "whole")
    assert [name for name in before if after.get(name) != before[name]] == [], "weights, optimiser and generators"
    assert set(after) == set(before)
    rows = read_jsonl(tmp_path / "killed" / "metrics.jsonl")
    probes = [[row for row in of if "probe/entropy" in row] for of in (rows, read_jsonl(tmp_path / "whole" / "metrics.jsonl"))]
    assert [row["step"] for row in probes[0]] == [0, 6, 12]
    assert probes[0] == probes[1], "what the probe sampled"
    ledgers = [(tmp_path / name / "ledger.jsonl").read_bytes() for name in ("killed", "whole")]
    assert ledgers[0] == ledgers[1]
    steps = [(row["step"], "loss" in row, "eval_loss" in row) for row in rows]
    assert len(steps) == len(set(steps)), "no step stands twice"


def stop_at(step, seen=None):
    """A sink that sends SIGTERM to this process when a step is done."""

    def sink(event):
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        if seen is not None:
            seen.append(event)

    return sink


def test_sigterm_checkpoints_and_stops(tmp_path, tiny_model):
    run_stage(make_plan(tmp_path, tiny_model, ROWS, folder="whole", checkpoints=0))
    before, seen = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM after step 5 of 12; .*step-000005 holds it, resume") as caught:
        run_stage(make_plan(tmp_path, tiny_model, ROWS, folder="stopped", checkpoints=0), stop_at(5, seen))
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert [event.step for event in seen if isinstance(event, CheckpointSaved)] == [5]
    assert max(losses_of(tmp_path / "stopped")) == 5, "the step was finished and none begun"
    assert not (tmp_path / "stopped" / "final").exists()
    result = run_stage(make_plan(tmp_path, tiny_model, ROWS, folder="stopped", checkpoints=0, resume=True))
    assert (result.resumed_from, result.steps) == (5, 12)
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    weights = [files_of(tmp_path / folder)["final/adapter_model.safetensors"] for folder in ("whole", "stopped")]
    assert weights[0] == weights[1]
    of_machine = {"pairs_per_second", "tokens_per_second", "peak_memory_gb", "elapsed_s"}
    whole, stopped = (
        [{key: row[key] for key in row.keys() - of_machine} for row in read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "stopped")
    )
    assert stopped == whole, "every metric, counts of tokens and places in the epoch too"
    times = [row["elapsed_s"] for row in read_jsonl(tmp_path / "stopped" / "metrics.jsonl") if "elapsed_s" in row]
    assert times == sorted(times), "seconds of the earlier process count"


@pytest.mark.parametrize("lost", ["generators", "moments", "position"])
def test_whatever_a_checkpoint_lost_would_show(tmp_path, tiny_model, monkeypatch, lost):
    """The features off, one by one: each changes the losses that follow."""
    run_stage(make_plan(tmp_path, tiny_model, ROWS, folder="whole", checkpoints=0))
    with pytest.raises(Interrupted):
        run_stage(make_plan(tmp_path, tiny_model, ROWS, folder="stopped", checkpoints=0), stop_at(5))
    real = resume_module.load_checkpoint

    def forgetful(path):
        checkpoint = real(path)
        if lost == "moments":
            object.__setattr__(checkpoint, "moments", {})
        return checkpoint

    monkeypatch.setattr(resume_module, "load_checkpoint", forgetful)
    if lost == "generators":
        monkeypatch.setattr(resume_module, "restore_generators", lambda state: None)
    if lost == "position":
        monkeypatch.setattr("preftune.training.order.epoch_order.__wrapped__", None, raising=False)
        monkeypatch.setattr("preftune.training.order.epoch_order", lambda count, seed, epoch: list(range(count)))
    run_stage(make_plan(tmp_path, tiny_model, ROWS, folder="stopped", checkpoints=0, resume=True))
    expected, got = losses_of(tmp_path / "whole"), losses_of(tmp_path / "stopped")
    assert [got[step] for step in range(1, 6)] == [expected[step] for step in range(1, 6)]
    assert [got[step] for step in range(6, 11)] != [expected[step] for step in range(6, 11)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its inductor; as an error it would undo the compiling
@pytest.mark.parametrize("how", ["on", "auto"])
def test_compiled_kernels_resume_to_the_same_bits(tmp_path, tiny_model, monkeypatch, how):
    """Stopped in mid-epoch and gone on with: kernels compiled anew, or from torch's cache, compute the same."""
    monkeypatch.setattr(compile_module, "WORTH_STEPS", 12)  # where auto begins to compile: the length of this stage
    seen = []

    def plan(folder, **changes):
        changes = {"compile": how, "checkpoints": 0} | changes
        return make_plan(tmp_path, tiny_model, ROWS, folder=folder, adapter="lora", **changes)

    torch.compiler.reset()  # what earlier tests compiled counts towards torch's limit on recompilations
    run_stage(plan("whole"), seen.append)
    torch.compiler.reset()
    with pytest.raises(Interrupted):
        run_stage(plan("stopped"), stop_at(5, seen))
    torch.compiler.reset()
    result = run_stage(plan("stopped", resume=True), seen.append)
    assert (result.resumed_from, result.steps) == (5, 12)
    layouts = [event.facts["layout"] for event in seen if isinstance(event, StageStarted)]
    assert layouts == ["shared/preftune_shared+2blocks/compiled/fused"] * 3
    noted = [(event.code, event.message.partition(" ")[0]) for event in seen if isinstance(event, Noted)]
    assert "not_bit_exact" not in [code for code, _ in noted]
    fallen = [event.message for event in seen if isinstance(event, Noted) and event.code == "not_compiled"]
    assert fallen == [], "every region is compiled, heads this narrow included"
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    weights = [files_of(tmp_path / folder)["final/adapter_model.safetensors"] for folder in ("whole", "stopped")]
    assert weights[0] == weights[1]


@pytest.fixture
def stopped(tmp_path, tiny_model):
    with pytest.raises(Interrupted):
        run_stage(make_plan(tmp_path, tiny_model, ROWS), stop_at(4))
    return tmp_path


def test_another_run_is_not_resumed(stopped, tiny_model, tmp_path_factory):
    from tiny import make_model

    cases = {
        "recipe": make_plan(stopped, tiny_model, ROWS, resume=True, lr=2e-3),
        "training data": make_plan(stopped, tiny_model, ROWS[::-1], resume=True),
        "seed": make_plan(stopped, tiny_model, ROWS, resume=True, seed=1),
        "reference model": make_plan(stopped, make_model(tmp_path_factory.mktemp("other"), seed=1), ROWS, resume=True),
    }
    for what, plan in cases.items():
        with pytest.raises(CheckpointError, match=f"was made with another {what}") as caught:
            run_stage(plan)
        assert "\n" not in str(caught.value)
    assert steps_in(stopped / "run" / "checkpoints") == [3, 4], "nothing was lost"


def test_a_damaged_checkpoint_is_named(stopped, tiny_model):
    file = stopped / "run" / "checkpoints" / "step-000004" / "parameters.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"parameters.safetensors is truncated .* delete it to go on from step 3"):
        run_stage(make_plan(stopped, tiny_model, ROWS, resume=True))
    import shutil

    shutil.rmtree(file.parent)
    assert run_stage(make_plan(stopped, tiny_model, ROWS, resume=True)).resumed_from == 3


def test_a_changed_machine_is_said(stopped, tiny_model):
    path = stopped / "run" / "checkpoints" / "step-000004" / "manifest.json"
    manifest = read_json(path)
    manifest["arithmetic"]["threads"] = 64
    path.write_text(json.dumps(manifest))
    seen = []
    run_stage(make_plan(stopped, tiny_model, ROWS, resume=True), seen.append)
    notes = [event for event in seen if isinstance(event, Noted) and event.code == "not_bit_exact"]
    assert ["threads changed" in event.message for event in notes] == [True]


def test_a_folder_in_use_is_not_overwritten(stopped, tiny_model):
    with pytest.raises(CheckpointError, match="holds an earlier run of this stage; resume it"):
        run_stage(make_plan(stopped, tiny_model, ROWS))


def test_a_finished_stage_is_returned_as_it_ended(tmp_path, tiny_model):
    first = run_stage(make_plan(tmp_path, tiny_model, ROWS, max_steps=2))
    seen = []
    again = run_stage(make_plan(tmp_path, tiny_model, ROWS, max_steps=2, resume=True), seen.append)
    assert not seen
    assert (again.steps, dict(again.metrics), again.final) == (first.steps, dict(first.metrics), first.final)
    with pytest.raises(CheckpointError, match="trained with another recipe"):
        run_stage(make_plan(tmp_path, tiny_model, ROWS, max_steps=2, lr=5e-4, resume=True))


def test_resume_where_nothing_is_starts(tmp_path, tiny_model):
    result = run_stage(make_plan(tmp_path, tiny_model, ROWS, max_steps=2, resume=True))
    assert (result.resumed_from, result.steps) == (0, 2)


def test_only_the_newest_checkpoints_are_kept(tmp_path, tiny_model):
    run_stage(make_plan(tmp_path, tiny_model, ROWS, checkpoints=5, keep_checkpoints=2))
    root = tmp_path / "run" / "checkpoints"
    assert steps_in(root) == [8, 10]
    checkpoint = load_checkpoint(latest(root))
    assert checkpoint.facts["epoch"] == 1
    assert checkpoint.facts["index"] == 16
    assert set(checkpoint.parameters) == {key.rpartition("/")[0] for key in checkpoint.moments}
    assert load_file(latest(root) / "model" / "adapter_model.safetensors")

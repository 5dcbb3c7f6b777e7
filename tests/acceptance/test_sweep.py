"""`preftune sweep` as a user runs it: shared stages once, the reference scored once, and a sweep that was killed goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTER = ROOT / "src" / "preftune" / "starter"


@pytest.fixture
def staged(tmp_path, pairs):
    path = tmp_path / "staged.yaml"
    path.write_text(
        "model: starter\nadapter: full\npairs_per_step: 8\nstages:\n"
        f"  - {{name: sft, method: sft, data: {STARTER}/sft.jsonl, lr: 1e-4, max_steps: 2}}\n"
        "  - {name: dpo, method: dpo, beta: 0.1, data: {train: pairs.jsonl, select: 0.1}, lr: 1e-4, max_steps: 3}\n"
        f"evaluation: {{prompts: {STARTER}/verdict.jsonl, judge: {STARTER}/judge_verdict.yaml, limit: 8,\n"
        "  decoding: {max_new_tokens: 16}}\n",
        encoding="utf-8",
    )
    return path


@pytest.mark.slow
def test_a_sweep_trains_shared_stages_once_and_scores_the_reference_once(preftune, staged, tmp_path):
    done = preftune("sweep", staged, "--grid", "stages.1.beta=0.05,0.5", "--grid", "stages.1.lr=1e-4,1e-3", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    forwards = [point["reference_forwards"] for point in result["points"]]
    assert forwards[0] > 0
    assert forwards[1:] == [0, 0, 0]
    assert len(list(tmp_path.glob("runs/sweep-*/shared/*/stages/1-sft/final"))) == 1
    assert not list(tmp_path.glob("runs/sweep-*/points/*/*/stages/*-sft"))
    for point in result["points"]:
        assert 0 <= point["interval"]["low"] <= point["rate"] <= point["interval"]["high"] <= 1
        assert point["joint"]["low"] <= point["interval"]["low"]
    assert Path(result["html"]).is_file()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(preftune, staged, environment, tmp_path):
    command = [str(Path(sys.executable).with_name("preftune")), "sweep", str(staged), "--grid", "stages.1.beta=0.05,0.2,0.5"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("runs/sweep-*/points.jsonl")):
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = next(tmp_path.glob("runs/sweep-*"))
    kept = (folder / "points.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) < 3
    done = preftune("sweep", "--resume", folder, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [point["settings"]["stages.1.beta"] for point in result["points"]] == [0.05, 0.2, 0.5]
    assert result["points"][0]["run"] == json.loads(kept[0])["point"]["run"]
    assert len(list(folder.glob("points/1/*"))) == 1


def test_a_sweep_that_makes_no_sense_is_one_line(preftune, staged):
    done = preftune("sweep", staged, "--grid", "stages.1.betta=1,2")
    assert done.returncode == 2
    assert "did you mean 'beta'" in done.stderr
    assert "Traceback" not in done.stderr
    assert preftune("sweep").returncode == 2
    assert preftune("sweep", "--resume", "nothing").returncode == 2

"""``torchrun -m preftune train`` as a user starts it: killed in the middle, then resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import make_model

from preftune.core.files import read_json, read_jsonl

pytestmark = pytest.mark.slow


def torchrun(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PREFTUNE_CACHE": str(folder / "cache"), "PREFTUNE_PROBE": "off"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "preftune"]
    return subprocess.Popen(
        [*command, *arguments], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def process_of_rank(parent, rank):
    """The number of the process that torchrun started for a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank}")


def test_killed_and_resumed_under_torchrun(tmp_path):
    make_model(tmp_path / "model")
    rows = [
        {"prompt": f"w{3 + at % 90} w5", "chosen": f"w{4 + at % 80} w7 w{9 + at % 50}", "rejected": f"w{11 + at % 70} w8"}
        for at in range(120)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        "model: {name: model, dtype: float32}\nmethod: dpo\nadapter: full\nlr: 1.0e-4\nepochs: 6\npairs_per_step: 4\n"
        "tokens_per_pack: 24\ndata: {train: pairs.jsonl, style: text, select: 0.2}\ncheckpoints: 8\nprobe: off\n"
    )
    running = torchrun(tmp_path, "train", "recipe.yaml")
    try:
        deadline = time.monotonic() + 240
        while not (done := list(tmp_path.glob("runs/*/stages/1-dpo/checkpoints/step-*"))) and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert done, running.communicate()[1]
        os.kill(process_of_rank(running.pid, 1), signal.SIGKILL)
        killed = time.monotonic()
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 1
    assert time.monotonic() - killed < 45
    assert re.search(r"^error: rank 1 \(process \d+ on \S+\) ended; all ranks end, resume the run", said, re.MULTILINE), said
    (run,) = tmp_path.glob("runs/*")
    assert read_json(run / "run.json")["status"] == "failed"

    out, said = (again := torchrun(tmp_path, "train", "--resume", run.name)).communicate(timeout=240)
    assert again.returncode == 0, said
    assert out.strip() == str(run / "stages" / "1-dpo" / "final")  # once, not from every rank
    assert said.count("done after") == 1
    steps = [row["step"] for row in read_jsonl(run / "stages" / "1-dpo" / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert read_json(run / "run.json")["status"] == "succeeded"
    assert {path.name for path in (run / "stages" / "1-dpo" / "final").iterdir()} >= {"config.json", "model.safetensors"}


def test_other_verbs_do_not_pretend_to_share_work(tmp_path):
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "preftune", "eval", "run"],
        env=environment,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert "torchrun started 2 processes, and only train shares its work; run eval without it" in done.stderr

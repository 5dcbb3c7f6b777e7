"""kill -9 while checkpoints are written: the short form; ``kill_checkpoints.py SECONDS`` is the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "kill_checkpoints.py"

CARELESS = """
import sys, json
from pathlib import Path
sys.path.insert(0, {folder!r})
import kill_checkpoints as soak
from contextlib import contextmanager
from preftune.training import checkpoint

@contextmanager
def write_in_place(path):  # the feature off: no temporary sibling, no rename
    path.mkdir(parents=True, exist_ok=True)
    step = int(path.name[5:])
    checkpoint.write_json(path / checkpoint.MANIFEST, dict(format=1, step=step, index=step, files={{}}))
    yield path

checkpoint.write_folder = write_in_place
soak.soak(Path({root!r}), {seconds})
"""


def run(arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.slow
def test_kill_9_leaves_the_previous_checkpoint(tmp_path):
    done = run([str(SCRIPT), "30", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    told = dict(pair.split("=") for pair in done.stdout.strip()[len("Tally(") : -1].split(", "))
    kills, inside = int(told["kills"]), int(told["during_a_write"])
    assert kills > 60, told
    assert inside > kills // 4, f"most kills must fall into a write: {told}"


@pytest.mark.slow
def test_writing_in_place_would_be_caught(tmp_path):
    script = CARELESS.format(folder=str(SCRIPT.parent), root=str(tmp_path / "checkpoints"), seconds=20)
    done = run(["-c", script])
    assert done.returncode == 1
    assert "Error" in done.stderr.splitlines()[-1], "a half-written checkpoint was found"

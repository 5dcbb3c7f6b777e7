"""Kill a process that writes checkpoints, thousands of times, and look at what is left.

    python tests/soak/kill_checkpoints.py [SECONDS] [FOLDER]

A child writes one checkpoint after the other and says so behind each; SIGKILL comes at a random moment. After each
kill the newest checkpoint must be whole (every digest holds), must hold what its step says, and must be no older than
the last one that the child announced. The parent forks, so that a kill costs milliseconds and not an import of torch.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from preftune.core.files import TEMPORARY_PREFIX
from preftune.training.checkpoint import latest, load_checkpoint, prune, save_checkpoint, steps_in

KEEP = 2
ROWS = 400  # three tensors of 400 x 256 float32: 0.4 MB each


@dataclass
class Tally:
    """What a soak saw."""

    kills: int = 0
    during_a_write: int = 0
    checkpoints: int = 0
    worst_leftover: int = 0


def write_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(200_000))


def write_for_ever(root: Path, step: int, pipe: int) -> None:
    """The child: checkpoints after ``step``, each announced when it is whole."""
    while True:
        step += 1
        save_checkpoint(
            root,
            step,
            facts={"epoch": 0, "index": step},
            parameters={"w": torch.full((ROWS, 256), float(step))},
            moments={"w/exp_avg": torch.full((ROWS, 256), -float(step)), "w/exp_avg_sq": torch.full((ROWS, 256), step / 2)},
            write_model=write_model,
        )
        prune(root, KEEP)
        os.write(pipe, step.to_bytes(8, "little"))


def kill_once(root: Path, step: int, delay: float) -> int:
    """Let a child write for a while, kill it, and return the last step that it announced."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with contextlib.suppress(BaseException):
            write_for_ever(root, step, write)
        os._exit(1)
    os.close(write)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child must die by the signal, not by an error of its own"
    announced = step
    while block := os.read(read, 8):
        announced = int.from_bytes(block, "little")
    os.close(read)
    return announced


def soak(root: Path, seconds: float, seed: int = 0) -> Tally:
    """Kill for this long; AssertionError or CheckpointError as soon as something was lost."""
    torch.set_num_threads(1)
    generator, tally, step = random.Random(seed), Tally(), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        announced = kill_once(root, step, generator.uniform(0, 0.08))
        newest = latest(root)
        assert (newest is None) == (not steps_in(root))
        left = sum(1 for _ in root.glob(f"{TEMPORARY_PREFIX}*")) if root.is_dir() else 0
        tally.kills += 1
        tally.during_a_write += left > 0
        tally.worst_leftover = max(tally.worst_leftover, left)
        if newest is None:
            assert announced == 0
            continue
        for one in steps_in(root):  # every one that has its name is whole, not the newest alone
            checkpoint = load_checkpoint(root / f"step-{one:06d}")
            assert checkpoint.facts["step"] == checkpoint.facts["index"] == one
            assert bool((checkpoint.parameters["w"] == one).all())
            assert bool((checkpoint.moments["w/exp_avg"] == -one).all())
        found = steps_in(root)[-1]
        assert announced <= found <= announced + 1, f"announced {announced}, found {found}"
        tally.checkpoints += found - step
        step = found
    return tally


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 300.0
    root = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
    try:
        print(soak(root / "checkpoints", seconds))
    finally:
        if len(sys.argv) <= 2:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()

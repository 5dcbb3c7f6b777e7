"""The same training as the peer's trainers for the losses beside DPO, step by step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-trl" / "bin" / "python"
SCRIPT = """
import json, random, sys
sys.path.insert(0, "bench")
import inputs, parity_losses
train, _, _ = inputs.rasbt_rows()
random.Random(0).shuffle(train)
method, steps = sys.argv[1], int(sys.argv[2])
done = parity_losses.compare(method, train[: 8 * steps], 0, steps, is_other=sys.argv[3] == "other")
print(json.dumps([done.rows_with_other_ids, done.losses]))
"""

pytestmark = [
    pytest.mark.trl,
    pytest.mark.slow,
    pytest.mark.skipif(not PEER.is_file(), reason="the peer's environment is absent: run bench/environments/make.sh trl"),
]


def compared(method: str, steps: int, options: str = "same") -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-c", SCRIPT, method, str(steps), options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    differing, losses = json.loads(done.stdout.splitlines()[-1])
    return differing, losses


@pytest.mark.parametrize("method", ["ipo", "simpo", "orpo", "kto"])
def test_losses_agree_at_every_step(shared_data: Path, method: str) -> None:
    differing, losses = compared(method, 6)
    assert differing == 0
    gaps = [abs(one - other) for one, other in zip(losses["trl"], losses["preftune"], strict=True)]
    assert len(gaps) == 6
    assert max(gaps) <= 1e-4
    # two systems that do not train at all would agree too; the first step of the warm-up has a rate of 0
    assert max(losses["preftune"][2:]) - min(losses["preftune"]) > 1e-3


def test_the_peers_orpo_counts_the_prompt(shared_data: Path) -> None:
    """The stated difference: TRL's NLL is over prompt and answer, and with the default scope the first losses differ by that."""
    differing, losses = compared("orpo", 1, "other")
    assert differing == 0, "the rows are the same"
    assert abs(losses["trl"][0] - losses["preftune"][0]) > 1e-2

"""The same training as the peer's: TRL 1.16's DPOTrainer on the same rows, weights, order and settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-trl" / "bin" / "python"

pytestmark = [
    pytest.mark.trl,
    pytest.mark.slow,
    pytest.mark.skipif(not PEER.is_file(), reason="the peer's environment is absent: run bench/environments/make.sh trl"),
]


@pytest.fixture(scope="module")
def parity(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("parity") / "parity.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "parity.py"), "--steps", "40", "--loss-steps", "0", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.is_file(), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_token_ids_are_equal(parity: dict[str, Any]) -> None:
    assert parity["rows"] == 320
    assert parity["rows_with_other_ids"] == 0


def test_losses_agree_at_every_step(parity: dict[str, Any]) -> None:
    assert parity["layout"].startswith("shared/")  # the fast path is the one that is compared
    assert parity["steps"] == 40
    assert parity["largest_gap"] <= 1e-4


def test_losses_move_far_more_than_they_differ(parity: dict[str, Any]) -> None:
    # two systems that do not train at all would agree too
    losses = parity["losses"]["preftune"]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses[0] - min(losses) > 0.1

"""The short form of the soak of jobs: kills of server, worker and training process, and nothing lost."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import kill_jobs

KILLS = int(os.environ.get("SOAK_KILLS", "3"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_is_lost_when_processes_are_killed(tmp_path: Path) -> None:
    found = kill_jobs.soak(tmp_path / "home", KILLS)
    assert found["kills"] == KILLS
    assert found["jobs"] >= 2

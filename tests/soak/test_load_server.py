"""The short form of the load: many clients at once, and no answer but a success."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import load_server


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_clients_at_once_get_no_error(tmp_path: Path) -> None:
    found = load_server.soak(tmp_path / "home", seconds=8, clients=20, records=400)
    assert not found["errors"], found["errors"]
    assert found["answers"]["ok"] > 20
    assert set(found["idle"]) == set(found["under_load"]) == set(load_server.PAGES)
    assert set(found["whole_list_s"]) == set(load_server.WHOLE)

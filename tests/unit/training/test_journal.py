"""metrics.jsonl: rows survive, and no step stands twice after a resume."""

from pathlib import Path

import pytest

from preftune.core.errors import PreftuneError
from preftune.core.files import read_jsonl
from preftune.training.journal import Journal


def test_what_will_be_computed_again_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    for step in (1, 2, 3, 4):
        journal.add(step, {"loss": step / 10})
    journal.add(4, {"eval_loss": 0.5})
    with path.open("ab") as file:
        file.write(b'{"step": 5, "lo')  # a crash cuts the last line
    again = Journal(path, step=3)
    assert again.last == {"loss": 0.3}
    again.add(4, {"loss": 0.4})
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4]
    assert Journal(path, step=4).last == {"loss": 0.4}


def test_rows_of_a_fresh_start_are_dropped_too(tmp_path):
    Journal(tmp_path / "metrics.jsonl").add(1, {"loss": 1.0})
    assert Journal(tmp_path / "metrics.jsonl").last == {}
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_no_file_is_made_for_nothing(tmp_path):
    assert Journal(tmp_path / "metrics.jsonl").last == {}
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(monkeypatch):
    journal = Journal(Path("/dev/null"))
    journal.path = Path("/dev/full")
    with pytest.raises(PreftuneError, match="metrics of step 3 cannot be written to /dev/full: No space left") as caught:
        journal.add(3, {"loss": 1.0})
    assert "\n" not in str(caught.value)

"""The verb label with judges whose opinion is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from judge_server import JudgeServer
from preftune.app.context import Context
from preftune.app.label import label_file
from preftune.core.errors import PreftuneError, UsageError
from preftune.core.records import Preference
from preftune.data.pipeline import read_examples

QUALITY = {"good": 9.0, "bad": -9.0, "plain": 0.0, "even": 0.0}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(first: str, second: str, **more: Any) -> dict[str, Any]:
    return {"prompt": f"{first}{second}?", "first": first, "second": second, **more}


def test_labels_ties_and_confidence_are_kept_and_read_back(tmp_path: Path) -> None:
    rows = [row("good", "bad"), row("bad", "good"), row("plain", "even"), row("good", "plain", label="second")]
    file, out, context = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl", Context(tmp_path / "c", tmp_path / "s")
    with JudgeServer(QUALITY, first=20.0) as server:  # the first place always wins
        judge = {"name": "llm", "model": "hidden", "url": server.url, "soft": "off"}
        with_place = label_file(file, {**judge, "seed": 1}, tmp_path / "place.jsonl", context=context)
        server.first = 2.0
        done = label_file(file, judge, out, context=context)
        calls = sum(server.calls.values())
        again = label_file(file, judge, out, context=context)
        assert sum(server.calls.values()) == calls
    assert (with_place.labels, with_place.consistency) == ({"first": 0, "second": 0, "tie": 3}, 0.0)
    assert done.kept == 1
    assert again.labels == done.labels
    assert again.judge_counts["cached"] == 6
    examples = read_examples([str(out)]).examples
    said = [one.judgement for one in examples]
    assert said[:2] == [Preference("first", confidence=1.0), Preference("second", confidence=1.0)]
    assert said[2] == Preference("tie")
    assert said[3] == Preference("second")
    assert "llm:hidden" in examples[0].provenance.judges
    assert examples[3].provenance.judges == ()


def test_a_malformed_answer_leaves_the_row_out_and_relabel_replaces(tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", row("good", "bad", label="second"), row("plain", "even", label="first"))
    context = Context(tmp_path / "c", tmp_path / "s")
    with JudgeServer(QUALITY, fault=lambda text, call: "malformed" if "plain" in text else None) as server:
        judge = {"name": "llm", "model": "hidden", "url": server.url}
        with pytest.raises(UsageError, match="no row is without a label"):
            label_file(file, judge, tmp_path / "out.jsonl", context=context)
        done = label_file(file, judge, tmp_path / "out.jsonl", relabel=True, context=context)
        assert done.labels == {"first": 1, "second": 0, "tie": 0}
        assert done.left_out == {"no_verdict": 1}
        alone = write(tmp_path / "one.jsonl", row("plain", "even"))
        with pytest.raises(PreftuneError, match="no verdict of any of 1 rows"):
            label_file(alone, judge, tmp_path / "none.jsonl", context=context)
        assert not (tmp_path / "none.jsonl").exists()
    with pytest.raises(UsageError, match="is the file that is read"):
        label_file(file, judge, file, relabel=True, context=context)

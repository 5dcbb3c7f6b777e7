"""Dataset versions: the same content has the same name, and nothing half written or altered is read."""

import json

import pytest

import preftune.data.dataset as module
from preftune.core.errors import InputError
from preftune.core.records import Demonstration, Desirability, Example, Message, Preference, Provenance, Ranking
from preftune.data.dataset import read_dataset, summary_of, write_dataset

CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}


FIRST = Preference("first")


def example(number, judgement=FIRST):
    completions = ((Message("assistant", f"é{number}", (CALL,), "ann", "call-1", "thought"),), (Message("assistant", "b"),))
    where = Provenance("a.jsonl", number, annotators=("ann",), judges=("rules",))
    return Example((Message("user", f"q{number}"),), completions, judgement, where, tools=({"type": "function"},))


JUDGEMENTS = [
    Preference("second", 2.0, 0.75),
    Demonstration(),
    Desirability(is_desirable=False),
    Ranking((2, 1)),
    Preference("tie"),
]
EXAMPLES = [example(number, judgement) for number, judgement in enumerate(JUDGEMENTS)]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 4)
    monkeypatch.setattr(module, "ROWS_PER_GROUP", 2)


def test_what_is_written_is_read_back(tmp_path, small_shards):
    examples = [example(number) for number in range(11)] + EXAMPLES
    written = write_dataset(tmp_path / "d", examples, counts={"rows": 20}, lineage={"files": {"a.jsonl": "trl-preference"}})
    dataset = read_dataset(tmp_path / "d")
    assert list(dataset) == examples
    assert [dataset[place] for place in (0, 15, 3, 4, 11)] == [examples[place] for place in (0, 15, 3, 4, 11)]
    assert len(dataset) == 16
    assert dataset.id == written.id == summary_of(examples)["id"]
    assert len(dataset.manifest["shards"]) == 4
    assert dataset.manifest["counts"] == {"rows": 20}
    for place in (-1, 16):
        with pytest.raises(IndexError):
            dataset[place]


def test_the_id_depends_on_content_and_order_only(tmp_path):
    one = write_dataset(tmp_path / "one", EXAMPLES)
    two = write_dataset(tmp_path / "two", EXAMPLES, lineage={"by": "somebody"})
    assert one.id == two.id
    assert write_dataset(tmp_path / "three", EXAMPLES[::-1]).id != one.id
    assert write_dataset(tmp_path / "four", EXAMPLES[1:]).id != one.id


def test_a_version_is_never_changed(tmp_path):
    write_dataset(tmp_path / "d", EXAMPLES)
    with pytest.raises(InputError, match="a dataset version is never changed"):
        write_dataset(tmp_path / "d", EXAMPLES)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield EXAMPLES[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_dataset(tmp_path / "d", broken())
    assert list(tmp_path.iterdir()) == []


def test_altered_missing_and_foreign_folders_are_refused(tmp_path):
    folder = tmp_path / "d"
    write_dataset(folder, EXAMPLES)
    shard = folder / "data-00000.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    with pytest.raises(InputError, match="its digest differs"):
        read_dataset(folder)
    shard.unlink()
    with pytest.raises(InputError, match="is missing"):
        read_dataset(folder)
    (folder / "manifest.json").write_text(json.dumps({"format_version": 99, "shards": []}), encoding="utf-8")
    with pytest.raises(InputError, match="format version 99"):
        read_dataset(folder)
    with pytest.raises(InputError, match="is no dataset version"):
        read_dataset(tmp_path)

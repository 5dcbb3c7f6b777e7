"""The append-only record: what a crash may leave behind, and what is refused."""

import json

import pytest

from preftune.core.errors import CheckpointError
from preftune.curation.judgement import Judgement
from preftune.curation.record import Drawn, Record

WANTED = [(f"p{number // 2}", number % 2, 100 + number) for number in range(10)]
REQUEST = {"model": "m", "seed": 1}


def drawn(start, stop):
    return [Drawn(*one, f"text {one}", 3, True) for one in WANTED[start:stop]]


@pytest.fixture
def folder(tmp_path):
    record = Record.open(tmp_path, REQUEST, WANTED, 4)
    record.add_samples(drawn(0, 4))
    record.add_samples(drawn(4, 8))
    record.add_judgement("p0", Judgement(0, None, 1.5))
    return tmp_path


@pytest.mark.parametrize(("cut", "left"), [(1, 4), (200, 4), (0, 8)])
def test_a_batch_that_was_cut_is_taken_off(folder, cut, left):
    path = folder / "drawn.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    record = Record.open(folder, REQUEST, WANTED, 4)
    assert record.drawn == drawn(0, left)
    record.add_samples(drawn(left, left + 4))
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [100 + one for one in range(min(10, left + 4))]


def test_a_judgement_that_was_cut_is_taken_off_and_the_others_stay(folder):
    path = folder / "judgements.jsonl"
    path.write_bytes(path.read_bytes() + b'{"prompt": "p1", "fir')
    record = Record.open(folder, REQUEST, WANTED, 4)
    assert record.known == {"p0": {(0, None): Judgement(0, None, 1.5)}}
    record.add_judgement("p1", Judgement(1, 0, 0.5))
    assert Record.open(folder, REQUEST, WANTED, 4).known["p1"] == {(1, 0): Judgement(1, 0, 0.5)}


def test_the_last_batch_may_be_smaller(folder):
    record = Record.open(folder, REQUEST, WANTED, 4)
    record.add_samples(drawn(8, 10))
    assert len(Record.open(folder, REQUEST, WANTED, 4).drawn) == 10


def test_another_request_is_refused(folder):
    with pytest.raises(CheckpointError, match="another seed"):
        Record.open(folder, {**REQUEST, "seed": 2}, WANTED, 4)


def test_an_altered_record_is_refused(folder):
    path = folder / "drawn.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(CheckpointError, match="was altered"):
        Record.open(folder, REQUEST, WANTED, 4)

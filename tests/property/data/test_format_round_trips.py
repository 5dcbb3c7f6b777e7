"""What a format writes it reads back as the same example, or it says that it cannot hold it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.core.errors import BadRow
from preftune.core.records import Demonstration, Desirability, Example, Message, Preference, Provenance, Ranking, pair_of
from preftune.data.formats.base import CannotHold, detect, formats, writable_formats
from preftune.data.sinks import write_rows
from preftune.data.sources.base import source_for

WHERE = Provenance("f", 1)
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda text: text.strip()
)
user = texts.map(lambda text: Message("user", text))
answer = texts.map(lambda text: Message("assistant", text))
prompts = st.one_of(
    st.tuples(user), st.tuples(texts.map(lambda text: Message("system", text)), user), st.tuples(user, answer, user)
)
preferences = st.builds(
    Preference, st.sampled_from(["first", "second", "tie"]), st.sampled_from([0.0, 1.0, 2.5]), st.sampled_from([None, 0.75, 1.0])
)


@st.composite
def examples(draw):
    count = draw(st.integers(1, 4))
    completions = draw(st.lists(st.tuples(answer), min_size=count, max_size=count, unique=True))
    judgement = {
        1: lambda: draw(st.sampled_from([Demonstration(), Desirability(True), Desirability(False)])),
        2: lambda: draw(preferences),
    }.get(count, lambda: Ranking(tuple(draw(st.lists(st.integers(1, 4), min_size=count, max_size=count)))))()
    if draw(st.booleans()) and count < 3:
        return Example((draw(user),), tuple(completions), judgement, WHERE, "text")
    return Example(draw(prompts), tuple(completions), judgement, WHERE)


@pytest.mark.parametrize("name", writable_formats())
@given(example=examples())
def test_what_is_written_is_read_back(name, example):
    form = formats.build(name)
    try:
        row = form.write(example)
    except CannotHold:
        return
    assert detect([row], "f") == name
    read = form.read(row, WHERE)
    if isinstance(example.judgement, Preference) and name != "comparison":
        ours, theirs = pair_of(example), pair_of(read)
        if theirs is None:  # a demonstration of the chosen one
            assert read.completions[0] == ours.chosen
        else:
            assert (theirs.prompt, theirs.chosen, theirs.rejected) == (ours.prompt, ours.chosen, ours.rejected)
    elif isinstance(read.judgement, Demonstration):
        assert read.completions[0] in example.completions
    else:
        assert (read.completions, read.judgement) == (example.completions, example.judgement)
    assert name == "hh-rlhf" or read.style == example.style
    assert [message.content for message in read.prompt] == [message.content for message in example.prompt]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".csv.gz", ".json.zst"])
def test_containers_hold_the_rows(tmp_path, suffix):
    rows = [{"prompt": 'q\u2028\n,"', "chosen": "ü", "rejected": "n"}, {"prompt": "q2", "chosen": "x", "rejected": ""}]
    path = tmp_path / f"rows{suffix}"
    assert write_rows(path, iter(rows)) == 2
    assert [row for _, row in source_for(path)[1].rows(path)] == rows
    first = path.read_bytes()
    write_rows(path, iter(rows))
    assert path.read_bytes() == first  # the same rows give the same bytes


def test_rows_that_break_leave_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old\n")

    def rows():
        yield {"a": 1}
        raise BadRow("x", "y")

    with pytest.raises(BadRow):
        write_rows(path, rows())
    assert path.read_text() == "old\n"
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]

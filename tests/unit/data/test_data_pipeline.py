"""Files to examples: what is left out is counted, named and never silent."""

import gzip
import json
import subprocess
import sys

import pytest

from preftune.core.errors import InputError, UnknownName, UsageError
from preftune.core.files import read_jsonl
from preftune.core.records import Message
from preftune.data.pipeline import check_files, iter_examples, read_examples, read_prompts, write_excluded


def row(prompt="q", chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def save(path, rows):
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows), encoding="utf-8")
    return str(path)


def test_every_bad_row_is_named_with_file_line_field_reason_and_excerpt(tmp_path):
    path = save(tmp_path / "a.jsonl", [row(), row(chosen=True), "{", row("p", "same", "same"), row("other")])
    result = read_examples([path])
    assert [example.provenance.line for example in result.examples] == [1, 5]
    assert result.formats == {path: "trl-preference"}
    assert result.counts == {"rows": 5, "kept": 2, "wrong_type": 1, "invalid_json": 1, "identical": 1}
    assert result.num_excluded == 3
    first, second, third = result.excluded
    assert first.to_dict() == {
        "file": path,
        "line": 2,
        "reason": "wrong_type",
        "detail": "chosen is a boolean (true), expected text",
        "field": "chosen",
        "excerpt": '{"prompt": "q", "chosen": true, "rejected": "no"}',
    }
    assert (second.line, second.excerpt) == (3, "{")
    assert (third.line, third.field) == (4, "rejected")
    write_excluded(tmp_path / "run" / "excluded.jsonl", result.excluded)
    assert read_jsonl(tmp_path / "run" / "excluded.jsonl") == [one.to_dict() for one in result.excluded]


def test_duplicates_are_counted_over_files(tmp_path):
    ours = save(tmp_path / "a.jsonl", [row(), row("2"), row()])
    theirs = save(tmp_path / "b.jsonl", [row("3"), row("2")])
    result = read_examples([ours, theirs])
    assert [(one.file, one.line, one.reason, one.detail) for one in result.excluded] == [
        (ours, 3, "duplicate", "repeats line 1"),
        (theirs, 2, "duplicate", f"repeats line 2 of {ours}"),
    ]
    assert result.counts["kept"] == len(result.examples) == 3


def test_contradictions_are_excluded_on_both_sides(tmp_path):
    path = save(tmp_path / "a.jsonl", [row("1"), row(), row("q", "no", "yes"), row("q", "no", "yes"), row("2")])
    result = read_examples([path])
    assert sorted((one.line, one.reason) for one in result.excluded) == [
        (2, "contradictory"),
        (3, "contradictory"),
        (4, "contradictory"),
    ]
    assert [example.provenance.line for example in result.examples] == [1, 5]
    assert result.counts == {"rows": 5, "kept": 2, "contradictory": 3}
    # the same two answers to another prompt are no contradiction
    assert read_examples([save(tmp_path / "b.jsonl", [row(), row("r", "no", "yes")])]).counts["kept"] == 2


def test_checking_counts_the_same_and_holds_no_example(tmp_path):
    rows = [row(str(number), "yes", "no" if number % 3 else "yes") for number in range(50)] + [row("1"), row("2", "no", "yes")]
    path = save(tmp_path / "a.jsonl", rows)
    read, seen = read_examples([path]), []
    checked = check_files([path], max_reported=5, on_example=seen.append)
    assert checked.counts == read.counts
    assert checked.examples == []
    assert checked.excluded == read.excluded[:5]
    assert len(seen) == read.counts["kept"] + 1  # one was contradicted only later
    assert len(list(iter_examples(path))) == len(seen)


def test_strict_refuses_with_the_first_bad_row_and_the_number_of_others(tmp_path):
    path = save(tmp_path / "a.jsonl", [row(), row(chosen=""), row(chosen=3), row(prompt=None, chosen=4)])
    with pytest.raises(
        InputError, match=r"a\.jsonl line 2: empty_completion: chosen is empty, and 2 more bad rows; correct them"
    ):
        read_examples([path], strict=True)
    assert read_examples([save(tmp_path / "b.jsonl", [row()])], strict=True).counts["kept"] == 1


def test_limit_counts_examples_and_reads_no_further(tmp_path):
    path = save(tmp_path / "a.jsonl", [row("1"), "{", row("2"), row("3"), "{"])
    result = read_examples([path], limit=2)
    assert [example.prompt_text for example in result.examples] == ["1", "2"]
    assert result.counts["rows"] == 3


def test_format_and_style_can_be_forced(tmp_path):
    path = save(tmp_path / "a.jsonl", [row()])
    assert read_examples([path], style="chat").examples[0].style == "chat"
    assert read_examples([path]).examples[0].style == "text"
    forced = read_examples([path], format="alpaca-preference")
    assert forced.counts == {"rows": 1, "kept": 0, "missing_field": 1} or forced.counts == {"rows": 1, "missing_field": 1}
    with pytest.raises(UnknownName, match="did you mean 'trl-preference'"):
        read_examples([path], format="trl-preferences")
    openai = save(tmp_path / "b.jsonl", [{"input": {}, "preferred_output": [{}], "non_preferred_output": [{}]}])
    with pytest.raises(UsageError, match="openai-preference is conversational"):
        read_examples([openai], style="text")


def test_files_that_hold_nothing_to_learn_from(tmp_path):
    with pytest.raises(InputError, match="holds prompts without completions: it serves evaluation"):
        read_examples([save(tmp_path / "a.jsonl", [{"prompt": "q"}])])
    with pytest.raises(InputError, match="no known format"):
        read_examples([save(tmp_path / "b.jsonl", [{"question": "q"}])])
    with pytest.raises(InputError, match="is empty"):
        read_examples([save(tmp_path / "c.json", ["[]"])])
    nothing = read_examples([save(tmp_path / "d.jsonl", ["{", "[1]", "x"])])
    assert nothing.formats == {str(tmp_path / "d.jsonl"): "unknown"}
    assert nothing.counts == {"rows": 3, "invalid_json": 2, "not_an_object": 1}


def test_lone_surrogates_are_a_bad_row(tmp_path):
    path = save(tmp_path / "a.jsonl", ['{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', row()])
    result = read_examples([path])
    assert [(one.line, one.reason) for one in result.excluded] == [(1, "invalid_unicode")]
    write_excluded(tmp_path / "excluded.jsonl", result.excluded)


def test_progress_is_told(tmp_path):
    told = []
    read_examples([save(tmp_path / "a.jsonl", [row(str(number)) for number in range(2500)])], on_progress=told.append)
    assert [event.done for event in told] == [1000, 2000]


# --- prompts ------------------------------------------------------------------------------------------------------


def test_prompts_of_a_prompts_file_are_user_turns(tmp_path):
    path = save(tmp_path / "a.jsonl", [{"prompt": "q"}, {"prompt": "q"}, {"messages": [{"role": "user", "content": "r"}]}])
    rows = read_prompts(path)
    assert [one.prompt for one in rows] == [(Message("user", "q"),), (Message("user", "r"),)]
    assert [(one.style, one.provenance.line) for one in rows] == [("chat", 1), ("chat", 3)]
    assert read_prompts(path, limit=1) == rows[:1]
    raw = save(tmp_path / "b.jsonl", [{"prompt": "Once upon"}])
    assert read_prompts(raw, style="text")[0].style == "text"


def test_prompts_of_a_preference_file(tmp_path):
    path = save(tmp_path / "a.jsonl", [row(), row("q", "perhaps"), row("r")])
    assert [(one.prompt[0].content, one.style) for one in read_prompts(path)] == [("q", "text"), ("r", "text")]


def test_a_conversation_that_ends_in_a_user_turn_is_a_prompt(tmp_path):
    talk = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    assert len(read_prompts(save(tmp_path / "a.jsonl", [{"messages": talk}]))[0].prompt) == 3


def test_a_bad_prompt_is_refused_or_reported(tmp_path):
    path = save(tmp_path / "a.jsonl", [{"prompt": "q"}, {"prompt": 3}, {"prompt": "\ud800"}])
    with pytest.raises(InputError, match=r"a\.jsonl line 2: wrong_type"):
        read_prompts(path)
    reported = []
    assert len(read_prompts(path, on_excluded=reported.append)) == 1
    assert [one.reason for one in reported] == ["wrong_type", "invalid_unicode"]
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(save(tmp_path / "b.jsonl", [{"prompt": 3}]), on_excluded=reported.append)


# --- real files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name", "counts"),
    [
        (
            "rasbt-preference/instruction-data-with-preference.json",
            "alpaca-preference",
            {"rows": 1100, "kept": 1094, "identical": 6},
        ),
        ("rasbt-instruct/instruction-data.json", "alpaca", {"rows": 1100, "kept": 1100}),
        ("orca-system/validation.jsonl", "openai-preference", {"rows": 284, "kept": 284}),
        ("tulu3-sample/preference_sample.jsonl", "trl-preference", {"rows": 100, "kept": 100}),
        ("oasst-trees-en/derived/pairs.jsonl", "trl-preference", {"rows": 754, "kept": 754}),
    ],
)
def test_real_files(shared_data, file, name, counts):
    path = str(shared_data / file)
    result = read_examples([path])
    assert result.formats == {path: name}
    assert result.counts == counts
    for example in result.examples:
        assert example.prompt[-1].role in {"user", "tool"}
        for completion in example.completions:
            assert completion[0].role == completion[-1].role == "assistant"
            assert completion[: len(example.prompt)] != example.prompt  # a repeated prompt is taken off


def test_the_traps_of_hh_rlhf(shared_data):
    paths = [str(shared_data / "hh-rlhf" / f"{kind}-base.test.jsonl.gz") for kind in ("helpful", "harmless")]
    counts = read_examples(paths).counts
    assert counts["prompts_differ"] == 14
    assert counts["identical"] == 2
    assert counts["empty_completion"] + counts["empty_content"] == 8
    assert counts["roles_do_not_alternate"] == 10


def test_real_prompts(shared_data):
    assert len(read_prompts(str(shared_data / "eval-prompts" / "ifeval.jsonl"))) == 541
    assert len(read_prompts(str(shared_data / "safety-prompts" / "xstest_prompts.csv"))) == 450


# --- scale and weight ---------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from preftune.data.pipeline import check_files
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts = check_files([sys.argv[1]], max_reported=10).counts
print(counts["rows"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_checking_a_large_file_takes_little_memory_and_no_torch(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for number in range(40_000):
            file.write(json.dumps(row(f"question {number}", "x" * 2000 if number % 2 else "{", "no")) + "\n")
            file.write("broken " + "y" * 500 + "\n")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    rows, megabytes = done.stdout.split()
    assert int(rows) == 80_000
    assert float(megabytes) < 60  # the texts alone are 100 MB

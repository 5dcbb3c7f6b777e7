"""Rows as other projects write them: what each gives, and what is refused."""

import json

import pytest

from preftune.core.errors import BadRow, InputError, UsageError
from preftune.core.records import Desirability, Message, Preference, Provenance, Ranking
from preftune.data.columns import parse_columns
from preftune.data.formats.base import detect, formats
from preftune.data.pipeline import check_files, read_examples

U, A = {"role": "user", "content": "q"}, lambda text: {"role": "assistant", "content": text}
ARENA = [U, A("x")], [U, A("y")]
CANDIDATES = [
    {"content": [{"text": "x"}], "preferenceLabel": "preferred"},
    {"content": [{"text": "y"}], "preferenceLabel": "non-preferred"},
]
NOVA = [{"role": "user", "content": [{"text": "q"}]}, {"role": "assistant", "candidates": CANDIDATES}]
VOTES = {"annotator1": 1, "annotator2": 1, "annotator3": 0}
SCORES = {"score_chosen": 9.0, "score_rejected": 3.0}
ROWS = {
    "seekrflow": {"messages": [U], "chosen": [U, A("x")], "rejected": [U, A("y")]},
    "llamafactory-sharegpt": {
        "conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "x"},
        "rejected": {"from": "gpt", "value": "y"},
    },
    "orca-pairs": {"system": "", "question": "q", "chosen": "x", "rejected": "y"},
    "aws-nova": {"schemaVersion": "bedrock-conversation-2024", "messages": NOVA},
    "chatbot-arena": {"model_a": "m", "winner": "model_a", "conversation_a": ARENA[0], "conversation_b": ARENA[1]},
    "helpsteer": {"context": [U], "response1": "x", "response2": "y", "overall_preference": -2},
    "pandalm": {"instruction": "q", "input": "", "response1": "x", "response2": "y"} | VOTES,
    "ultrafeedback-binarized": {"prompt": "q", "chosen": [U, A("x")], "rejected": [U, A("y")]} | SCORES,
    "edits": {"prompt": [U], "completion": "y", "edited": "x"},
    "comparison": {"prompt": [U], "first": "x", "second": "y", "label": "first"},
}  # fmt: skip


def read(name, row):
    return formats.build(name).read(row, Provenance("f", 1))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_format_gives_the_same_pair_and_is_recognised(name):
    example = read(name, ROWS[name])
    assert example.prompt == (Message("user", "q"),)
    assert [one[0].content for one in example.completions] == ["x", "y"]
    assert example.judgement.preferred == "first"
    assert detect([ROWS[name]], "f") == name
    assert [other for other in formats.names() if formats.build(other).matches(ROWS[name])] == [name]


@pytest.mark.parametrize(
    ("name", "changes", "judgement"),
    [
        ("chatbot-arena", {"winner": "model_b"}, Preference("second")),
        ("chatbot-arena", {"winner": "tie (bothbad)"}, Preference("tie")),
        ("helpsteer", {"overall_preference": 3}, Preference("second", 3.0)),
        ("helpsteer", {"overall_preference": 0}, Preference("tie", 0.0)),
        ("helpsteer", {"individual_preference": [{"score": -1}, {"score": -3}, {"score": 1}]}, Preference("first", 2.0, 2 / 3)),
        ("pandalm", {"annotator2": 2}, Preference("tie")),
        ("pandalm", {"annotator1": "2", "annotator2": 2}, Preference("second", 0.0, 2 / 3)),
        ("ultrafeedback-binarized", {"score_rejected": 9.0}, Preference("tie")),
        ("ultrafeedback-binarized", {}, Preference("first", 2.0)),
        ("comparison", {"label": "tie", "strength": 1, "confidence": 0.8}, Preference("tie", 1.0, 0.8)),
    ],
)
def test_judgements_are_kept(name, changes, judgement):
    assert read(name, ROWS[name] | changes).judgement == judgement


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("chatbot-arena", {"winner": "model_c"}, "wrong_label"),
        ("helpsteer", {"overall_preference": 4}, "wrong_label"),
        ("pandalm", {"annotator1": True}, "wrong_label"),
        ("pandalm", {"response1": True}, "wrong_type"),
        ("ultrafeedback-binarized", {"score_chosen": 1.0}, "scores_contradict"),
        ("llamafactory-sharegpt", {"conversations": [{"from": "bot", "value": "q"}]}, "unknown_role"),
        ("seekrflow", {"chosen": [{"role": "user", "content": "other"}, A("x")]}, "prompts_differ"),
        ("edits", {"edited": "y"}, "identical"),
        ("comparison", {"label": "third"}, "wrong_label"),
        ("comparison", {"confidence": 0.2}, "wrong_type"),
        ("aws-nova", {"messages": [U, {"role": "assistant", "candidates": []}]}, "too_few_completions"),
    ],
)
def test_what_makes_no_sense_is_named(name, changes, reason):
    with pytest.raises(BadRow) as caught:
        read(name, ROWS[name] | changes)
    assert caught.value.reason == reason


def test_ratings_become_ranks_by_their_mean():
    def rated(text, *ratings):
        names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
        return {
            "response": text,
            "overall_score": 10,
            "annotations": {n: {"Rating": r} for n, r in zip(names, ratings, strict=True)},
        }

    row = {
        "instruction": "q",
        "completions": [rated("a", "4", "4", "4", "4"), rated("b", "5", "5", "5", "N/A"), rated("c", "3", "5", "4", "4")],
    }
    example = read("ultrafeedback", row)
    assert example.judgement == Ranking((2, 1, 2))


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"prompt": "q", "completion": "x", "label": True}, True),
        ({"prompt": [U], "completion": [A("x")], "label": 0}, False),
        ({"messages": [U, A("x")], "label": False}, False),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}], "kto_tag": True}, True),
        ({"instruction": "q", "output": "x", "kto_tag": "false"}, False),
    ],
)
def test_unpaired_labels(row, label):
    name = detect([row], "f")
    example = read(name, row)
    assert example.judgement == Desirability(label)
    assert example.completions[0][0].content == "x"


def test_a_tree_gives_many_examples_and_one_bad_branch_does_not_end_it(tmp_path):
    def reply(text, rank, *replies, role="assistant"):
        return {"text": text, "role": role, "rank": rank, "replies": list(replies)}

    again = reply("more", None, reply("c", 0), reply("c2", 1), role="prompter")
    bad = reply("and", None, reply("d", 0), reply("  ", 1), role="prompter")
    tree = {
        "message_tree_id": "1",
        "prompt": {"text": "q", "role": "prompter", "replies": [reply("b", 1), reply("a", 0, again, bad)]},
    }
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    found = read_examples([str(path)])
    assert found.counts == {"rows": 1, "kept": 2, "empty_completion": 1}
    assert found.num_excluded == 1
    assert [len(one.prompt) for one in found.examples] == [1, 3]
    assert [one.judgement.ranks for one in found.examples] == [(2, 1), (1, 2)]


def test_declared_columns_and_labels(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text("question,a,b,who,id\nq,x,y,2,7\nq2,x,y,0,8\nq3,x,y,9,9\n", encoding="utf-8")
    columns = parse_columns("prompt=question,first=a,second=b,label=who", "1=first,2=second,0=tie")
    found = read_examples([str(path)], columns=columns)
    assert [one.judgement.preferred for one in found.examples] == ["second", "tie"]
    assert found.counts["wrong_label"] == 1
    with pytest.raises(InputError, match="has no column 'q' for prompt: there is question, a, b, who, id"):
        check_files([str(path)], columns=parse_columns("prompt=q"))
    for wrong in ("promt=q", "prompt", "=x"):
        with pytest.raises(UsageError):
            parse_columns(wrong)
    with pytest.raises(UsageError, match="first, second, tie"):
        parse_columns(None, "1=best")


def test_a_system_column_stands_before_the_prompt(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"s": "Be brief.", "q": "q", "good": "x", "bad": "y"}\n', encoding="utf-8")
    example = read_examples([str(path)], columns=parse_columns("system=s,prompt=q,chosen=good,rejected=bad")).examples[0]
    assert [message.role for message in example.prompt] == ["system", "user"]


def test_ids_of_tool_calls_and_reasoning_are_kept():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [U, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4", "tool_call_id": "1"}]
    row = {"prompt": turns, "chosen": [{**A("x"), "reasoning_content": "because"}], "rejected": [A("y")]}
    example = read("trl-preference", row)
    assert example.prompt[2].tool_call_id == "1"
    assert example.completions[0][0].reasoning_content == "because"
    assert formats.build("trl-preference").write(example) == row


def test_a_ranking_with_tool_calls_is_read():
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = {
        "prompt": "q",
        "completions": [[{"role": "assistant", "content": "a", "tool_calls": [call]}], "b", "b"],
        "ranks": [1, 3, 2],
    }
    assert read("ranking", row).judgement == Ranking((1, 2))


def test_strength_and_confidence_are_read_beside_a_pair():
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "strength": 2.5, "confidence": "0.8"}
    assert read("trl-preference", row).judgement == Preference("first", 2.5, 0.8)


def test_a_mapped_row_is_named_by_the_users_columns_and_keeps_its_system_turn(tmp_path):
    path = tmp_path / "s.jsonl"
    rows = [{"s": "Be brief.", "q": [U], "good": "x", "bad": "y"}, {"s": "", "q": [U], "good": "", "bad": "y"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read_examples([str(path)], columns=parse_columns("system=s,prompt=q,chosen=good,rejected=bad"))
    assert [message.role for message in found.examples[0].prompt] == ["system", "user"]
    assert found.excluded[0].field == "good"


@pytest.mark.parametrize("value", [1.0, "1", 1, "1.0"])
def test_labels_are_the_same_written_as_numbers_or_texts(value):
    assert parse_columns(None, "1=first").apply({"label": value}) == {"label": "first"}

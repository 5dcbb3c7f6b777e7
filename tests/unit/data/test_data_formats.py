"""Schemas: each row becomes one example or one bad row that names the field."""

import pytest

from preftune.core.errors import BadRow, InputError
from preftune.core.records import Demonstration, Message, Preference, Provenance
from preftune.data.formats.base import detect, formats

U, A, S = "user", "assistant", "system"
WHERE = Provenance("f", 1)


def m(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def turns(*pairs):
    return tuple(Message(role, content) for role, content in pairs)


ASK, GOOD, BAD = m((U, "q")), m((A, "yes")), m((A, "no"))
PAIR = (turns((U, "q")), turns((A, "yes")), turns((A, "no")))


def read(name, row, style=None):
    return formats.build(name, {"style": style}).read(row, WHERE)


def parts(example):
    assert example.judgement == Preference("first")
    return (example.prompt, *example.completions)


def refused(name, row, style=None):
    with pytest.raises(BadRow) as caught:
        read(name, row, style)
    return caught.value.reason, caught.value.field


CHAT_PAIRS = {
    "explicit": ("trl-preference", {"prompt": ASK, "chosen": GOOD, "rejected": BAD}),
    "implicit": ("trl-preference", {"chosen": ASK + GOOD, "rejected": ASK + BAD}),
    "prompt repeated": ("trl-preference", {"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD}),
    "h4": ("trl-preference", {"prompt": "q", "prompt_id": "1", "chosen": ASK + GOOD, "rejected": ASK + BAD}),
    "prompt text beside answers": ("trl-preference", {"prompt": "q", "chosen": GOOD, "rejected": BAD}),
    "answers as text": ("trl-preference", {"prompt": ASK, "chosen": "yes", "rejected": "no"}),
    "openai": ("openai-preference", {"input": {"messages": ASK}, "preferred_output": GOOD, "non_preferred_output": BAD}),
    "alpaca": ("alpaca-preference", {"instruction": "q", "input": "", "output": "o", "chosen": "yes", "rejected": "no"}),
    "null columns": ("trl-preference", {"prompt": None, "chosen": ASK + GOOD, "rejected": ASK + BAD, "tools": None}),
    "hh": ("hh-rlhf", {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"}),
}


@pytest.mark.parametrize("case", CHAT_PAIRS)
def test_every_notation_gives_the_same_pair(case):
    name, row = CHAT_PAIRS[case]
    assert detect([row], "f") == name
    example = read(name, row)
    assert parts(example) == PAIR
    assert example.style == "chat"
    assert example.provenance is WHERE


def test_text_pairs_stay_raw_text():
    example = read("trl-preference", {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."})
    assert parts(example) == (turns((U, "The sky is")), turns((A, " blue.")), turns((A, " green.")))
    assert example.style == "text"
    for row in (
        {"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    ):
        assert parts(read("trl-preference", row)) == parts(example)
    chat = read("trl-preference", {"prompt": "q", "chosen": "yes", "rejected": "no"}, style="chat")
    assert parts(chat) == PAIR
    assert chat.style == "chat"


def test_implicit_text_prompt_never_cuts_a_word():
    for chosen, rejected, prompt in [
        ("Say it: blueish", "Say it: bluer", "Say it:"),
        ("A\nblue", "A\nblack", "A\n"),
        ("yes it is", "yes it is not", "yes it is"[:6]),
    ]:
        assert read("trl-preference", {"chosen": chosen, "rejected": rejected}).prompt_text == prompt
    assert refused("trl-preference", {"chosen": "yes", "rejected": "no"}) == ("missing_field", "prompt")


def test_a_prompt_that_only_one_side_repeats_is_not_taken_off():
    example = read("trl-preference", {"prompt": "a", "chosen": "a cat", "rejected": "the dog"})
    assert example.completions[0] == turns((A, "a cat"))


def test_conversations_that_part_at_an_earlier_answer_keep_all_turns():
    row = {"chosen": ASK + m((A, "1"), (U, "more"), (A, "2")), "rejected": ASK + m((A, "x"))}
    example = read("trl-preference", row)
    assert example.prompt == turns((U, "q"))
    assert example.completions[0] == turns((A, "1"), (U, "more"), (A, "2"))


def test_system_developer_parts_tools_and_names():
    tool = {"type": "function", "function": {"name": "look"}}
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    row = {
        "input": {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
                {"role": "user", "content": "q", "name": "ann"},
            ],
            "tools": [tool],
            "parallel_tool_calls": True,
        },
        "preferred_output": [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "here", "tool_call_id": "1"},
            {"role": "tool", "content": "there"},
            {"role": "assistant", "content": "It is here."},
        ],
        "non_preferred_output": BAD,
    }
    example = read("openai-preference", row)
    assert example.prompt == (Message(S, "be kind"), Message(U, "q", name="ann"))
    assert example.completions[0][0] == Message(A, "", (call,))
    assert [message.role for message in example.completions[0]] == ["assistant", "tool", "tool", "assistant"]
    assert example.tools == (tool,)
    as_text = read("trl-preference", {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "tools": '[{"type": "function"}]'})
    assert as_text.tools == ({"type": "function"},)


TURNS = ASK + GOOD
CALL_FIELD = "chosen.0.function_call"
IMAGE = [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ({"prompt": ASK, "chosen": GOOD}, "missing_field", "rejected"),
        ({"prompt": "q", "chosen": True, "rejected": "no"}, "wrong_type", "chosen"),
        ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "wrong_type", "prompt"),
        ({"prompt": ASK, "chosen": m((A, True)), "rejected": BAD}, "wrong_type", "chosen.0.content"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": ["no"]}, "wrong_type", "rejected.0"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": "no", "tools": 1}, "wrong_type", "rejected"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "tools": 1}, "wrong_type", "tools"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "tools": "{"}, "wrong_type", "tools"),
        ({"prompt": "q", "chosen": "", "rejected": "no"}, "empty_completion", "chosen"),
        ({"prompt": "q", "chosen": "yes", "rejected": " \n"}, "empty_completion", "rejected"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": []}, "empty_completion", "rejected"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": m((A, " "))}, "empty_completion", "rejected"),
        ({"prompt": "", "chosen": "yes", "rejected": "no"}, "empty_prompt", "prompt"),
        ({"prompt": [], "chosen": GOOD, "rejected": BAD}, "empty_prompt", "prompt"),
        ({"prompt": m((U, "a"), (A, ""), (U, "b")), "chosen": GOOD, "rejected": BAD}, "empty_content", "prompt"),
        ({"prompt": "q", "chosen": "yes", "rejected": "yes"}, "identical", "rejected"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": GOOD}, "identical", "rejected"),
        ({"chosen": ASK + GOOD, "rejected": ASK + GOOD}, "identical", "rejected"),
        ({"chosen": "same text", "rejected": "same text"}, "identical", "rejected"),
        ({"chosen": ASK + GOOD, "rejected": m((U, "other"), (A, "no"))}, "prompts_differ", "rejected.0"),
        ({"chosen": TURNS + m((U, "1"), (A, "2")), "rejected": TURNS + m((U, "3"), (A, "4"))}, "prompts_differ", "rejected.2"),
        ({"chosen": ASK + GOOD, "rejected": ASK}, "empty_completion", "rejected"),
        ({"prompt": "else", "chosen": ASK + GOOD, "rejected": ASK + BAD}, "prompts_differ", "prompt"),
        ({"prompt": ASK + ASK, "chosen": GOOD, "rejected": BAD}, "roles_do_not_alternate", "prompt"),
        ({"prompt": ASK + GOOD, "chosen": GOOD, "rejected": BAD}, "roles_do_not_alternate", "prompt"),
        ({"prompt": ASK, "chosen": GOOD + GOOD, "rejected": BAD}, "roles_do_not_alternate", "chosen"),
        ({"prompt": ASK, "chosen": GOOD + ASK, "rejected": BAD}, "does_not_end_in_assistant", "chosen"),
        ({"prompt": ASK, "chosen": m((U, "x")), "rejected": BAD}, "no_assistant_turn", "chosen"),
        ({"prompt": m(("gpt", "q")), "chosen": GOOD, "rejected": BAD}, "unknown_role", "prompt.0.role"),
        ({"prompt": [{"content": "q"}], "chosen": GOOD, "rejected": BAD}, "missing_field", "prompt.0.role"),
        ({"prompt": [{"role": "user"}], "chosen": GOOD, "rejected": BAD}, "missing_field", "prompt.0.content"),
        ({"prompt": IMAGE, "chosen": GOOD, "rejected": BAD}, "vision_or_audio", "prompt.0.content.1"),
        ({"prompt": ASK, "chosen": [{**GOOD[0], "audio": {"id": 1}}], "rejected": BAD}, "vision_or_audio", "chosen.0.audio"),
        ({"prompt": ASK, "chosen": [{**GOOD[0], "function_call": {"n": 1}}], "rejected": BAD}, "unsupported_field", CALL_FIELD),
    ],
)  # fmt: skip
def test_bad_rows_name_reason_and_field(row, reason, field):
    assert refused("trl-preference", row) == (reason, field)


def test_openai_rows_name_their_own_fields():
    row = {"input": {"messages": ASK}, "preferred_output": GOOD, "non_preferred_output": GOOD}
    assert refused("openai-preference", row) == ("identical", "non_preferred_output")
    assert refused("openai-preference", {**row, "input": None}) == ("missing_field", "input")
    assert refused("openai-preference", {**row, "input": []}) == ("wrong_type", "input")
    assert refused("openai-preference", {**row, "input": {}}) == ("missing_field", "input.messages")
    assert refused("openai-preference", row, "text") == ("no_text_style", None)


def test_alpaca_prompts():
    row = {"instruction": "Do.", "input": "this", "chosen": "yes", "rejected": "no", "output": "yes"}
    assert read("alpaca-preference", row).prompt_text == "Do.\n\nthis"
    assert read("alpaca-preference", {**row, "input": None}).prompt_text == "Do."
    text = read("alpaca-preference", row, "text")
    assert (text.style, text.prompt_text) == ("text", "Do.\n\nthis\n\n")
    assert refused("alpaca-preference", {**row, "instruction": "", "input": " "}) == ("empty_prompt", "instruction")
    sft = {"instruction": "Do.", "input": "this", "output": "yes"}
    assert detect([sft], "f") == "alpaca"
    example = read("alpaca", sft)
    assert example.judgement == Demonstration()
    assert (example.prompt_text, example.completions) == ("Do.\n\nthis", (turns((A, "yes")),))
    assert read("alpaca", sft, "text").prompt_text == "Do.\n\nthis\n\n"
    assert refused("alpaca", {**sft, "output": ""}) == ("empty_completion", "output")


def test_prompt_completion():
    text = read("prompt-completion", {"prompt": "The sky is", "completion": " blue."})
    assert (text.style, text.judgement, text.completions) == ("text", Demonstration(), (turns((A, " blue.")),))
    for row in ({"prompt": ASK, "completion": GOOD}, {"prompt": "q", "completion": GOOD}, {"prompt": ASK, "completion": "yes"}):
        assert detect([row], "f") == "prompt-completion"
        assert (read("prompt-completion", row).prompt, read("prompt-completion", row).completions[0]) == PAIR[:2]
    assert read("prompt-completion", {"prompt": "q", "completion": "yes"}, "chat").style == "chat"
    assert read("prompt-completion", {"prompt": ASK, "completion": ASK + GOOD}).completions == (PAIR[1],)
    assert refused("prompt-completion", {"prompt": "q"}) == ("missing_field", "completion")
    assert refused("prompt-completion", {"prompt": "q", "completion": False}) == ("wrong_type", "completion")


def test_messages_are_split_at_the_first_answer():
    row = {"messages": m((S, "be kind"), (U, "q"), (A, "1"), (U, "more"), (A, "2"))}
    assert detect([row], "f") == "messages"
    example = read("messages", row)
    assert example.prompt == turns((S, "be kind"), (U, "q"))
    assert example.completions == (turns((A, "1"), (U, "more"), (A, "2")),)
    assert refused("messages", {"messages": ASK}) == ("no_assistant_turn", "messages")
    assert refused("messages", {"messages": ASK + GOOD + ASK}) == ("does_not_end_in_assistant", "messages")
    weighted = {"messages": [*ASK, {"role": A, "content": "1", "weight": 0}]}
    assert refused("messages", weighted) == ("no_assistant_turn", "messages")
    behind = {"messages": [*ASK, *GOOD, *ASK, {"role": A, "content": "1", "weight": 0}]}
    assert refused("messages", behind) == ("unsupported_field", "messages.3.weight")


def test_prompts():
    for row in ({"prompt": "q"}, {"prompt": ASK}, {"messages": ASK}):
        assert detect([row], "f") == "prompts"
        example = read("prompts", row)
        assert (example.prompt, example.completions, example.style) == (PAIR[0], (), "chat")
    assert read("prompts", {"prompt": "q"}, "text").style == "text"
    assert refused("prompts", {"prompt": " "}) == ("empty_prompt", "prompt")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "prompts_differ"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "empty_completion"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b", "identical"),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c",
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: d",
            "roles_do_not_alternate",
        ),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: b\n\nHuman: d", "does_not_end_in_assistant"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b\n\nHuman: e\n\nAssistant: d", "prompts_differ"),
    ],
)
def test_hh_rows_that_make_no_pair(chosen, rejected, reason):
    assert refused("hh-rlhf", {"chosen": chosen, "rejected": rejected})[0] == reason


def test_detection_takes_what_fits_most_and_says_what_there_is():
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3 + [{"prompt": "q", "completion": "a"}]
    assert detect(rows, "f") == "trl-preference"
    with pytest.raises(
        InputError, match=r"f: no known format has the fields of the first row \(question, winner\); there is alpaca, "
    ):
        detect([{"question": 1, "winner": 2}], "f")
    with pytest.raises(InputError, match=r"\(none\)"):
        detect([{}], "f")

"""Tokens: the prompt as at inference, only assistant tokens scored, one end where nothing was cut, one beginning."""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import preftune.data.tokenize as module
from chat_tokenizers import KINDS, tokenizer_of
from preftune.core.errors import InputError
from preftune.core.records import Demonstration, Example, Message, Preference, Provenance
from preftune.data.chat import BUILTIN_TEMPLATES, render_completion, render_prompt
from preftune.data.pipeline import read_examples
from preftune.data.tokenize import prompt_ids_of, tokenise
from preftune.modeling.tokenizer import HubTokenizer

U, A, S, T = "user", "assistant", "system", "tool"
CHAT_KINDS = sorted(set(KINDS) - {"tools"})
THINKING = {"thinking", "opened"}


def turns(*pairs):
    return tuple(Message(role, content) for role, content in pairs)


def pair(prompt, chosen, rejected, style="chat", **more):
    return Example(prompt, (chosen, rejected), Preference("first"), Provenance("file.jsonl", 3), style, **more)


def short(chosen="It is here.", rejected="Go away."):
    return pair(turns((U, "Where is it?")), turns((A, chosen)), turns((A, rejected)))


def run(example, tokenizer, view="pairs", max_length=512, too_long="exclude"):
    examples = example if isinstance(example, list) else [example]
    return tokenise(examples, tokenizer, view=view, max_length=max_length, too_long=too_long)


def one(example, tokenizer, **options):
    result = run(example, tokenizer, **options)
    assert not result.excluded, result.excluded
    return result.examples[0]


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def scored_text(tokenizer, completion):
    return text_of(tokenizer, [token for token, is_scored in zip(completion.ids, completion.scored, strict=True) if is_scored])


# --- the prompt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_prompt_is_exactly_what_the_model_sees_at_inference(kind):
    tokenizer = tokenizer_of(kind)
    example = short()
    at_inference = tokenizer.raw.apply_chat_template(
        [message.to_dict() for message in example.prompt], add_generation_prompt=True, return_dict=False
    )
    tokens = one(example, tokenizer)
    assert list(tokens.prompt_ids) == at_inference
    assert tokens.prompt_ids == prompt_ids_of(example.prompt, tokenizer)


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_at_most_one_beginning_token(kind):
    tokenizer = tokenizer_of(kind)
    ids = one(short(), tokenizer).prompt_ids
    assert ids.count(tokenizer.bos_id) == (tokenizer.bos_id is not None)


def test_a_template_that_doubles_the_beginning_is_refused_not_trained():
    tokenizer = tokenizer_of("llama3")
    doubled = HubTokenizer(tokenizer.raw, [])
    doubled.render = lambda messages, **rest: "<s>" + tokenizer.render(messages, **rest)
    result = run(short(), doubled)
    assert [row.reason for row in result.excluded] == ["two_beginning_tokens"]


# --- the completion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_completion_is_the_answer_and_one_end_token(kind):
    tokenizer = tokenizer_of(kind)
    tokens = one(short(), tokenizer)
    chosen, rejected = tokens.completions
    assert text_of(tokenizer, chosen.ids[:-1]).strip().startswith("It is here.")
    assert text_of(tokenizer, rejected.ids[:-1]).strip().startswith("Go away.")
    for completion in tokens.completions:
        assert completion.ids[-1] in tokenizer.eos_ids
        assert sum(token in tokenizer.eos_ids for token in completion.ids) == 1
        assert all(completion.scored)
        assert not completion.is_cut
    assert tokens.boundary == ("appended" if kind in THINKING else "exact")


def test_what_stands_behind_the_end_token_is_dropped():
    tokenizer = tokenizer_of("chatml")
    whole = tokenizer.render([*short().prompt, *short().completions[0]], add_generation_prompt=False)
    assert whole.endswith("<|im_end|>\n")
    tokens = one(short(), tokenizer)
    assert text_of(tokenizer, (*tokens.prompt_ids, *tokens.completions[0].ids)) == whole.removesuffix("\n")


def test_first_end_token_ends_the_turn_where_the_template_writes_two():
    tokenizer = tokenizer_of("two-ends")
    assert tokenizer.render(turns((U, "a"), (A, "b")), add_generation_prompt=False).endswith("<|end|>\n<|endoftext|>")
    assert text_of(tokenizer, one(short(), tokenizer).completions[0].ids) == "It is here.<|end|>"


def test_end_token_is_added_and_counted_where_the_template_has_none():
    tokenizer = tokenizer_of("chatml-as-text")
    result = run(short(), tokenizer)
    assert text_of(tokenizer, result.examples[0].completions[0].ids) == "It is here.<|im_end|></s>"
    assert result.counts["end_token_added"] == 2
    assert "end_token_added" not in run(short(), tokenizer_of("chatml")).counts


def test_an_end_token_written_inside_an_answer_does_not_end_it():
    tokenizer = tokenizer_of("chatml")
    tokens = one(short("Write <|im_end|> to stop."), tokenizer)
    assert text_of(tokenizer, tokens.completions[0].ids) == "Write <|im_end|> to stop.<|im_end|>"


def test_trimming_templates_are_exact():
    tokens = one(short("  It is here.\n\n"), tokenizer_of("llama3"))
    assert tokens.boundary == "exact"
    assert text_of(tokenizer_of("llama3"), tokens.completions[0].ids) == "It is here.<|eot_id|>"


# --- thinking templates -------------------------------------------------------------------------------------------


def test_empty_reasoning_block_is_not_trained():
    tokenizer = tokenizer_of("thinking")
    example = short()
    whole = tokenizer.render([*example.prompt, *example.completions[0]], add_generation_prompt=False)
    assert "<think>\n\n</think>\n\nIt is here." in whole  # what a trainer that slices the rendering would score
    result = run(example, tokenizer)
    assert result.counts["boundary_appended"] == 1
    assert text_of(tokenizer, result.examples[0].completions[0].ids) == "It is here.<|im_end|>"


def test_reasoning_in_the_data_is_scored_as_it_stands():
    tokenizer = tokenizer_of("thinking")
    answer = "<think>\nhm\n</think>\n\nIt is here."
    tokens = one(short(answer), tokenizer)
    assert scored_text(tokenizer, tokens.completions[0]) == f"{answer}<|im_end|>"


def test_reasoning_opened_by_the_generation_prompt_is_not_opened_twice():
    tokenizer = tokenizer_of("opened")
    tokens = one(short("<think>\nhm</think>\nIt is here."), tokenizer)
    assert text_of(tokenizer, tokens.prompt_ids).endswith("<think>\n")
    assert text_of(tokenizer, tokens.completions[0].ids) == "hm</think>\nIt is here.</s>"
    assert tokens.boundary == "appended"


# --- several turns ------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}


def agentic(last="It is here."):
    calls = (Message(A, "Let me see.", (CALL,)), Message(T, "here"), Message(A, last))
    return pair(turns((U, "Where is it?")), calls, turns((A, "Go away.")))


def test_only_assistant_turns_of_a_completion_are_scored():
    tokenizer = tokenizer_of("tools")
    completion = one(agentic(), tokenizer).completions[0]
    assert scored_text(tokenizer, completion) == "Let me see.\n<tool_call>look</tool_call><|im_end|>It is here.<|im_end|>"
    context = [token for token, is_scored in zip(completion.ids, completion.scored, strict=True) if not is_scored]
    assert text_of(tokenizer, context) == "\n<|im_start|>tool\nhere<|im_end|>\n<|im_start|>assistant\n"


def test_the_mask_matters():
    """A tokeniser without the mask scores what the tool said: this test's own check must see that."""
    completion = one(agentic(), tokenizer_of("tools")).completions[0]
    unmasked = replace(completion, scored=(True,) * len(completion.ids))
    assert "here<|im_end|>\n<|im_start|>assistant" in scored_text(tokenizer_of("tools"), unmasked)
    assert completion.num_scored < unmasked.num_scored


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma", "mistral", "two-ends", "thinking", "plain", "chatml-as-text"])
def test_user_turns_inside_a_demonstration_are_context(kind):
    tokenizer = tokenizer_of(kind)
    completion = turns((A, "one word"), (U, "again please"), (A, "no thank you"))
    example = Example(turns((U, "say")), (completion,), Demonstration(), Provenance("f", 1))
    tokens = one(example, tokenizer, view="demonstrations").completions[0]
    scored = scored_text(tokenizer, tokens)
    assert "one word" in scored
    assert "no thank you" in scored
    assert "again" not in scored
    assert "again please" in text_of(tokenizer, tokens.ids)
    if kind != "chatml-as-text":
        ends = [place for place, token in enumerate(tokens.ids) if token in tokenizer.eos_ids and tokens.scored[place]]
        assert len(ends) == 2
        assert ends[-1] == len(tokens.ids) - 1


def test_thinking_template_drops_reasoning_from_history_and_the_mask_still_holds():
    tokenizer = tokenizer_of("thinking")
    completion = turns((A, "<think>\nhm\n</think>\n\none"), (U, "again"), (A, "two"))
    example = Example(turns((U, "say")), (completion,), Demonstration(), Provenance("f", 1))
    result = run(example, tokenizer, view="demonstrations")
    assert result.counts["boundary_appended"] == 1
    tokens = result.examples[0].completions[0]
    assert scored_text(tokenizer, tokens) == "<think>\nhm\n</think>\n\none<|im_end|>two<|im_end|>"


# --- the joint ----------------------------------------------------------------------------------------------------


def test_tokens_that_would_merge_over_the_joint_do_not():
    tokenizer = tokenizer_of("plain")
    tokens = one(pair(turns((U, "It is beh")), turns((A, "ind the house.")), turns((A, "no")), style="text"), tokenizer)
    merged = tokenizer.encode("It is behind the house.", add_special_tokens=False)
    assert merged[: len(tokens.prompt_ids)] != list(tokens.prompt_ids)  # encoding both in one go changes the prompt
    assert tokens.boundary == "appended"
    assert tokens.prompt_ids == tuple(tokenizer.encode("It is beh", add_special_tokens=False))
    assert text_of(tokenizer, (*tokens.prompt_ids, *tokens.completions[0].ids)) == "It is behind the house.</s>"


def test_appended_text_has_no_blank_in_front(shared_data):
    raw = AutoTokenizer.from_pretrained(shared_data / "models" / "tinystories-656k" / "hf")
    tokenizer = HubTokenizer(raw, [2])
    tokens = one(pair(turns((U, "She said")), turns((A, "ing a song")), turns((A, " no")), style="text"), tokenizer)
    with_blank = tokenizer.encode("ing a song", add_special_tokens=False)
    assert text_of(tokenizer, with_blank) != "ing a song" or list(tokens.completions[0].ids[:-1]) != with_blank
    whole = text_of(tokenizer, (*tokens.prompt_ids[1:], *tokens.completions[0].ids[:-1]))
    assert whole.strip() == "She saiding a song"


def test_unknown_characters_that_fuse_over_the_joint_are_not_swallowed(shared_data):
    raw = AutoTokenizer.from_pretrained(shared_data / "models" / "tinystories-656k" / "hf")
    raw.backend_tokenizer.model.unk_token = "<unk>"
    raw.backend_tokenizer.model.fuse_unk = True
    tokenizer = HubTokenizer(raw, [2])
    tokens = one(pair(turns((U, "Say é")), turns((A, "éé it")), turns((A, " no")), style="text"), tokenizer)
    whole = tokenizer.encode("Say ééé it", add_special_tokens=False)
    assert whole[: len(tokens.prompt_ids) - 1] == list(tokens.prompt_ids[1:])  # one token for both sides' characters
    assert tokens.completions[0].ids[0] == raw.unk_token_id
    assert tokens.boundary == "appended"


# --- raw text -----------------------------------------------------------------------------------------------------


def test_raw_text_takes_the_beginning_from_the_tokenizer_and_the_end_from_us(shared_data):
    raw = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K" / "hf")
    tokenizer = HubTokenizer(raw, [1, 2])
    tokens = one(pair(turns((U, "Once upon")), turns((A, " a time")), turns((A, " a day")), style="text"), tokenizer)
    assert tokens.prompt_ids[0] == tokenizer.bos_id
    assert tokens.prompt_ids.count(tokenizer.bos_id) == 1
    assert [completion.ids[-1] for completion in tokens.completions] == [tokenizer.end_id] * 2
    assert all(all(completion.scored) for completion in tokens.completions)
    assert tokenizer.bos_id not in tokens.completions[0].ids


def test_automatic_end_token_is_not_put_between_prompt_and_completion():
    from tokenizers.processors import TemplateProcessing

    base = tokenizer_of("plain-bos").raw
    model = type(base.backend_tokenizer).from_str(base.backend_tokenizer.to_str())
    special = [(token, base.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    model.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    raw = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
    tokenizer = HubTokenizer(raw, [])
    assert tokenizer.encode("Where", add_special_tokens=True)[-1] == tokenizer.end_id
    tokens = one(pair(turns((U, "Where")), turns((A, " is it")), turns((A, " am I")), style="text"), tokenizer)
    assert text_of(tokenizer, (*tokens.prompt_ids, *tokens.completions[0].ids)) == "<s>Where is it</s>"
    again = one(pair(turns((U, "<s>Where")), turns((A, " is it")), turns((A, " am I")), style="text"), tokenizer)
    assert again.prompt_ids == tokens.prompt_ids  # a beginning written out in the text is not doubled


def test_chat_rows_without_template_are_an_error_that_says_what_to_do():
    raw = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("plain").raw.backend_tokenizer, eos_token="</s>")
    with pytest.raises(InputError, match="set chat_template: chatml, plain or a file"):
        run(short(), HubTokenizer(raw, []))


# --- what does not fit --------------------------------------------------------------------------------------------


def test_too_long_is_excluded_with_its_lengths():
    tokenizer = tokenizer_of("plain")
    tokens = one(short(), tokenizer)
    longest = len(tokens.prompt_ids) + max(len(completion.ids) for completion in tokens.completions)
    assert one(short(), tokenizer, max_length=longest) == tokens
    result = run(short(), tokenizer, max_length=longest - 1)
    assert [row.reason for row in result.excluded] == ["too_long"]
    assert str(len(tokens.prompt_ids)) in result.excluded[0].detail
    assert (result.excluded[0].file, result.excluded[0].line) == ("file.jsonl", 3)


def test_a_cut_completion_has_no_end_token_and_is_counted():
    tokenizer = tokenizer_of("plain")
    tokens = one(short(), tokenizer)
    limit = len(tokens.prompt_ids) + len(tokens.completions[0].ids) - 1
    result = run(short(), tokenizer, max_length=limit, too_long="cut")
    chosen, rejected = result.examples[0].completions
    assert chosen.is_cut
    assert chosen.ids == tokens.completions[0].ids[:-1]
    assert not set(chosen.ids) & tokenizer.eos_ids
    assert result.examples[0].prompt_ids == tokens.prompt_ids
    assert rejected.is_cut == (len(tokens.completions[1].ids) > len(chosen.ids))
    assert result.counts["cut"] == chosen.is_cut + rejected.is_cut


def test_pairs_cut_to_the_same_tokens_are_excluded():
    tokenizer = tokenizer_of("plain")
    example = short("It is here and there.", "It is here or nowhere.")
    prompt = len(one(example, tokenizer).prompt_ids)
    result = run(example, tokenizer, max_length=prompt + 2, too_long="cut")
    assert result.counts == {"identical_after_cut": 1}
    assert run(example, tokenizer, max_length=prompt, too_long="cut").counts == {"prompt_too_long": 1}


def test_answers_that_differ_only_in_what_the_template_trims_are_excluded():
    result = run(short("It is here.", "It is here. "), tokenizer_of("llama3"))
    assert result.counts == {"identical_tokens": 1}


def test_a_template_that_refuses_a_row_excludes_it_with_its_own_words():
    example = pair(turns((S, "be kind"), (U, "hi")), turns((A, "hello")), turns((A, "go")))
    result = run([example, short()], tokenizer_of("gemma"))
    assert result.counts["template_error"] == 1
    assert "System role not supported" in result.excluded[0].detail
    assert len(result.examples) == 1


def test_views_take_what_they_can_use():
    tie = replace(short(), judgement=Preference("tie"))
    demonstration = Example(turns((U, "a")), (turns((A, "b")),), Demonstration(), Provenance("f", 1))
    tokenizer = tokenizer_of("chatml")
    assert run([tie, demonstration], tokenizer).counts == {"tie": 1, "not_a_pair": 1}
    assert run([tie], tokenizer, view="demonstrations").counts == {"not_a_demonstration": 1}
    second = replace(short(), judgement=Preference("second", 2.0, 0.9))
    tokens = one(second, tokenizer)
    assert text_of(tokenizer, tokens.completions[0].ids) == "Go away.<|im_end|>"  # chosen first, wherever it is stored
    assert (tokens.strength, tokens.confidence) == (2.0, 0.9)
    assert text_of(tokenizer, one(second, tokenizer, view="demonstrations").completions[0].ids) == "Go away.<|im_end|>"


# --- real tokenizers on real rows ---------------------------------------------------------------------------------


def test_unknown_characters_are_scored_though_they_are_the_padding_token(shared_data):
    raw = AutoTokenizer.from_pretrained(shared_data / "models" / "tinystories-656k" / "hf")
    raw.backend_tokenizer.model.unk_token = "<unk>"  # transformers' own class loses it
    raw.chat_template = BUILTIN_TEMPLATES["plain"]
    tokenizer = HubTokenizer(raw, [2])
    assert raw.pad_token_id == raw.unk_token_id
    file = str(shared_data / "rasbt-preference" / "instruction-data-with-preference.json")
    result = run(read_examples([file]).examples, tokenizer)
    assert result.counts["kept"] == 1094
    unknown = [
        completion.scored[place]
        for tokens in result.examples
        for completion in tokens.completions[:1]
        for place, token in enumerate(completion.ids)
        if token == raw.pad_token_id
    ]
    assert len(unknown) >= 170
    assert all(unknown)
    for tokens in result.examples:
        for completion in tokens.completions:
            assert completion.num_scored == len(completion.ids)
            assert completion.ids.count(2) == 1


def test_rows_of_which_the_tokenizer_loses_characters_are_excluded_not_trained(shared_data):
    raw = AutoTokenizer.from_pretrained(shared_data / "models" / "tinystories-656k" / "hf")
    raw.backend_tokenizer.model.unk_token = None
    tokenizer = HubTokenizer(raw, [2])
    result = run(pair(turns((U, "Say it in French.")), turns((A, " café")), turns((A, " cafe")), style="text"), tokenizer)
    assert result.counts == {"characters_lost": 1}


@pytest.mark.parametrize("template", ["chatml", "plain"])
@pytest.mark.parametrize("model", ["stories260K", "tokenizer-gpt2"])
def test_real_tokenizers_rebuild_the_rendered_text(shared_data, model, template):
    folder = shared_data / "models" / model
    if model == "tokenizer-gpt2":
        raw = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    else:
        raw = AutoTokenizer.from_pretrained(folder / "hf")
    raw.chat_template = BUILTIN_TEMPLATES[template]
    tokenizer = HubTokenizer(raw, [])
    files = [str(shared_data / name) for name in ("orca-system/validation.jsonl", "tulu3-sample/preference_sample.jsonl")]
    examples = read_examples(files, limit=330).examples[::5]
    result = run(examples, tokenizer, max_length=100_000)
    by_id = {tokens.example_id: tokens for tokens in result.examples}
    assert len(by_id) == len(examples)
    for example in examples:
        prompt = render_prompt(tokenizer, example.prompt)
        for messages, completion in zip(example.completions, by_id[example.id].completions, strict=True):
            rendered = render_completion(tokenizer, prompt, example.prompt, messages)
            behind = text_of(tokenizer, (*by_id[example.id].prompt_ids, *completion.ids))
            assert messages[0].content in rendered.text
            assert "".join(behind.split()).startswith("".join((prompt + messages[0].content).split()))


def test_the_starter_is_exact(starter_model, shared_data):
    if not (starter_model / "tokenizer.json").exists():
        pytest.skip("the starter is not built yet")
    raw = AutoTokenizer.from_pretrained(starter_model)
    tokenizer = HubTokenizer(raw, [])
    file = str(shared_data / "rasbt-preference" / "instruction-data-with-preference.json")
    result = run(read_examples([file], limit=100).examples, tokenizer)
    assert result.counts == {"kept": 100}


def test_progress_is_told(monkeypatch):
    monkeypatch.setattr(module, "EXAMPLES_BETWEEN_REPORTS", 2)
    told = []
    examples = [short(f"It is {number}.") for number in range(5)]
    tokenise(examples, tokenizer_of("chatml"), view="pairs", max_length=99, too_long="exclude", on_progress=told.append)
    assert [(event.done, event.total) for event in told] == [(2, 5), (4, 5)]

"""Whatever comes in: formats round-trip, bytes never break the reader, tokens and packs keep their invariants."""

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import preftune.data.tokenize as module
from chat_tokenizers import KINDS, tokenizer_of
from preftune.core.errors import InputError
from preftune.core.records import Demonstration, Example, Message, Preference, Provenance, TokenisedCompletion, TokenisedExample
from preftune.data.chat import render_completion, render_prompt
from preftune.data.dataset import example_from_json, example_to_json
from preftune.data.minhash import normalise
from preftune.data.pack import pack_of, pack_step
from preftune.data.pipeline import read_examples
from preftune.data.split import split_by_prompt
from preftune.data.tokenize import tokenise

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)
WORDS = st.text("ab .\n\tÉé字🙂<|>", min_size=1, max_size=25).filter(str.strip)


@st.composite
def prompts(draw, text=TEXT):
    turns = [Message("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [Message("user", draw(text)), Message("assistant", draw(text))]
    return (*turns, Message("user", draw(text)))


@st.composite
def pairs(draw, text=TEXT):
    prompt, chosen, rejected = draw(prompts(text)), draw(text), draw(text)
    assume(chosen != rejected)
    completions = ((Message("assistant", chosen),), (Message("assistant", rejected),))
    return Example(prompt, completions, Preference("first"), Provenance("f", 1))


@st.composite
def conversations(draw, text=TEXT):
    completion = [Message("assistant", draw(text))]
    for _ in range(draw(st.integers(0, 2))):
        completion += [Message("user", draw(text)), Message("assistant", draw(text))]
    return Example((Message("user", draw(text)),), (tuple(completion),), Demonstration(), Provenance("f", 1))


def dicts(messages):
    return [message.to_dict() for message in messages]


def read_one(row, name, ending, style=None):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}"
        content = json.dumps(row, ensure_ascii=False).encode()
        path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
        result = read_examples([str(path)], format=name, style=style)
    assert not result.excluded, result.excluded
    return result.examples[0]


WRITERS = {
    "explicit": ("trl-preference", lambda p, c, r: {"prompt": dicts(p), "chosen": dicts(c), "rejected": dicts(r)}),
    "implicit": ("trl-preference", lambda p, c, r: {"chosen": dicts(p + c), "rejected": dicts(p + r)}),
    "repeated": ("trl-preference", lambda p, c, r: {"prompt": dicts(p), "chosen": dicts(p + c), "rejected": dicts(p + r)}),
    "h4": ("trl-preference", lambda p, c, r: {"prompt": p[-1].content, "chosen": dicts(p + c), "rejected": dicts(p + r)}),
    "openai": (
        "openai-preference",
        lambda p, c, r: {"input": {"messages": dicts(p)}, "preferred_output": dicts(c), "non_preferred_output": dicts(r)},
    ),
}


@pytest.mark.parametrize("notation", WRITERS)
@given(pair=pairs(), ending=st.sampled_from([".jsonl", ".json", ".jsonl.gz"]), detected=st.booleans())
@settings(max_examples=40)
def test_pairs_survive_every_notation(notation, pair, ending, detected):
    name, write = WRITERS[notation]
    found = read_one(write(pair.prompt, *pair.completions), None if detected else name, ending)
    assert (found.prompt, found.completions, found.judgement) == (pair.prompt, pair.completions, pair.judgement)
    assert found.id == pair.id


@given(talk=conversations())
@settings(max_examples=40)
def test_conversations_survive(talk):
    found = read_one({"messages": dicts(talk.prompt + talk.completions[0])}, None, ".jsonl")
    assert found.id == talk.id


@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
@settings(max_examples=60)
def test_texts_survive(prompt, chosen, rejected):
    assume(chosen != rejected and not (chosen.startswith(prompt) and rejected.startswith(prompt)))
    found = read_one({"prompt": prompt, "chosen": chosen, "rejected": rejected}, None, ".jsonl")
    assert [found.prompt_text, *(one[0].content for one in found.completions)] == [prompt, chosen, rejected]
    assert found.style == "text"


@given(one=st.one_of(pairs(), conversations()))
@settings(max_examples=40)
def test_examples_survive_the_dataset(one):
    assert example_from_json(json.loads(json.dumps(example_to_json(one))), "f", 1) == one


FIELDS = ["prompt", "chosen", "rejected", "messages", "role", "content", "tools", "input", "x"]
ENDINGS = [".jsonl", ".json", ".csv", ".jsonl.gz", ".jsonl.zst", ".parquet", ""]
JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "chosen", "rejected", "messages", "role", "content", "tools", "input", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def never_breaks(content, ending):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}"
        path.write_bytes(content)
        message = ""
        try:
            result = read_examples([str(path)])
        except InputError as error:
            message = str(error)
        assert "\n" not in message
        if message:
            return
        assert result.counts["rows"] == len(result.examples) + len(result.excluded)
        json.dumps([row.to_dict() for row in result.excluded]).encode()


@given(
    content=st.binary(max_size=200),
    ending=st.sampled_from(ENDINGS),
)
@example(content=b"{}", ending=".jsonl")
@example(content=b"[[]]", ending=".json")
@example(content=b'{"prompt": NaN, "chosen": "a", "rejected": "b"}', ending=".jsonl")
@settings(max_examples=300)
def test_no_bytes_break_the_reader(content, ending):
    never_breaks(content, ending)


@given(rows=st.lists(JSONISH | st.binary(max_size=8), min_size=1, max_size=6), ending=st.sampled_from([".jsonl", ".json"]))
@settings(max_examples=300)
def test_no_rows_break_the_reader(rows, ending):
    content = b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    never_breaks(content, ending)


SIDE = {"role": "assistant", "content": "yes"}


@given(value=JSONISH, field=st.sampled_from(["prompt", "chosen", "rejected", "tools"]))
@settings(max_examples=200)
def test_no_value_in_a_good_row_breaks_the_reader(value, field):
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [SIDE], "rejected": [{**SIDE, "content": "no"}], field: value}
    never_breaks(json.dumps(row).encode(), ".jsonl")


# --- tokens -------------------------------------------------------------------------------------------------------

NO_SYSTEM = {"gemma", "mistral", "opened"}


def check_invariants(one, tokens, tokenizer):
    """What must hold of any tokenised chat example, whatever the template does."""
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    prompt = render_prompt(tokenizer, one.prompt)
    assert decode(tokens.prompt_ids) == prompt
    assert tokens.prompt_ids == tuple(tokenizer.encode(prompt, add_special_tokens=False))
    assert tokens.prompt_ids[:2].count(tokenizer.bos_id) <= 1
    for messages, completion in zip(one.completions, tokens.completions, strict=True):
        assert len(completion.ids) == len(completion.scored)
        assert completion.scored[-1]
        assert completion.ids[-1] in tokenizer.eos_ids
        rendered = render_completion(tokenizer, prompt, one.prompt, messages)
        decoded = decode((*tokens.prompt_ids, *completion.ids))
        if completion.ids[-1] == tokenizer.end_id and not (prompt + rendered.text).startswith(decoded):
            decoded = decode((*tokens.prompt_ids, *completion.ids[:-1]))  # an end token that the template has not
        assert (prompt + rendered.text).startswith(decoded)
        assert not (prompt + rendered.text)[len(decoded) :].strip() or "two" in tokenizer.name
        marked = list(zip(completion.ids, completion.scored, strict=True))
        texts = {side: decode([token for token, is_scored in marked if is_scored == side]) for side in (True, False)}
        for message in messages:
            side, content = message.role == "assistant", message.content.strip()
            assert content in texts[side]
            texts[side] = texts[side].split(content, 1)[1]


@pytest.mark.parametrize("kind", sorted(KINDS))
@given(one=st.one_of(pairs(WORDS), conversations(WORDS)))
@settings(max_examples=30)
def test_token_invariants(kind, one):
    assume(not (kind in NO_SYSTEM and one.prompt[0].role == "system"))
    tokenizer = tokenizer_of(kind)
    view = "pairs" if isinstance(one.judgement, Preference) else "demonstrations"
    result = tokenise([one], tokenizer, view=view, max_length=100_000, too_long="exclude")
    if result.excluded:
        assert result.counts.keys() <= {"identical_tokens"}
        return
    check_invariants(one, result.examples[0], tokenizer)


@pytest.mark.parametrize("mutation", ["no mask", "keep the rest", "no end", "merge"])
def test_the_invariants_can_fail(mutation, monkeypatch):
    """Each of four broken tokenisers breaks the check above on this one conversation."""
    turns = (Message("assistant", "one"), Message("user", "again"), Message("assistant", "two"))
    one = Example((Message("user", "say"),), (turns,), Demonstration(), Provenance("f", 1))
    tokenizer = tokenizer_of("chatml")
    run = lambda: tokenise([one], tokenizer, view="demonstrations", max_length=999, too_long="exclude").examples[0]
    good = run()
    check_invariants(one, good, tokenizer)
    if mutation == "no mask":
        unmasked = lambda ids, scored, is_cut=False: TokenisedCompletion(ids, (True,) * len(ids), is_cut)
        monkeypatch.setattr(module, "TokenisedCompletion", unmasked)
    elif mutation == "keep the rest":
        monkeypatch.setattr(module, "_turn_end", lambda rendered, turn, ids, offsets, eos: (len(ids), True))
    elif mutation == "no end":
        monkeypatch.setattr(module, "_turn_end", lambda rendered, turn, ids, offsets, eos: (1, True))
    else:
        monkeypatch.setattr(module, "_chat_prompt", lambda text, tok: tuple(tok.encode(text.rstrip(), add_special_tokens=False)))
    with pytest.raises(AssertionError):
        check_invariants(one, run(), tokenizer)


@given(one=pairs(WORDS), limit=st.integers(1, 60), too_long=st.sampled_from(["exclude", "cut"]))
@settings(max_examples=150)
def test_nothing_is_longer_than_the_limit_and_the_prompt_is_never_cut(one, limit, too_long):
    tokenizer = tokenizer_of("llama3")
    whole = tokenise([one], tokenizer, view="pairs", max_length=100_000, too_long="exclude").examples
    assume(whole)
    result = tokenise([one], tokenizer, view="pairs", max_length=limit, too_long=too_long)
    assert len(result.examples) + len(result.excluded) == 1
    for tokens in result.examples:
        assert tokens.prompt_ids == whole[0].prompt_ids
        for completion, original in zip(tokens.completions, whole[0].completions, strict=True):
            assert len(tokens.prompt_ids) + len(completion.ids) <= limit
            assert original.ids[: len(completion.ids)] == completion.ids
            assert completion.is_cut == (completion.ids != original.ids)
            assert (completion.ids[-1] in tokenizer.eos_ids) == (not completion.is_cut)
        assert tokens.completions[0].ids != tokens.completions[1].ids


# --- packs --------------------------------------------------------------------------------------------------------


@st.composite
def tokenised(draw):
    ids = st.integers(0, 99)
    completions = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, 6))
        scored = draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any))
        completions.append(TokenisedCompletion(tuple(draw(st.lists(ids, min_size=length, max_size=length))), tuple(scored)))
    return TokenisedExample("x", tuple(draw(st.lists(ids, min_size=1, max_size=6))), tuple(completions))


@given(examples=st.lists(tokenised(), max_size=8))
@settings(max_examples=150)
def test_pack_layout(examples):
    pack = pack_of(examples)
    completions = [(group, completion) for group in examples for completion in group.completions]
    assert len(pack.ids) == len(pack.positions) == sum(one.num_tokens for one in examples)
    assert len(pack.rows) == len(pack.targets) == len(pack.segments) == pack.num_tokens.sum()
    assert pack.num_tokens.tolist() == [completion.num_scored for _, completion in completions]
    seen = iter(zip(pack.rows.tolist(), pack.targets.tolist(), pack.segments.tolist(), strict=True))
    at = number = 0
    for group, one in zip(pack.groups, examples, strict=True):
        size = len(one.prompt_ids)
        assert group.start == at
        assert pack.positions[at : at + size].tolist() == list(range(size))
        prompt_end = at + size - 1
        at += size
        for completion in one.completions:
            assert pack.ids[at : at + len(completion.ids)].tolist() == list(completion.ids)
            # a plain row of prompt + completion has the same token at each position
            assert pack.positions[at : at + len(completion.ids)].tolist() == list(range(size, size + len(completion.ids)))
            for place, is_scored in enumerate(completion.scored):
                if is_scored:
                    row, target, segment = next(seen)
                    assert (target, segment) == (completion.ids[place], number)
                    assert row == (prompt_end if place == 0 else at + place - 1)
                    assert pack.positions[row] == size + place - 1
            at += len(completion.ids)
            number += 1
    assert next(seen, None) is None


@given(examples=st.lists(tokenised(), max_size=10), budget=st.integers(1, 60))
@settings(max_examples=150)
def test_steps_keep_groups_whole_and_the_budget(examples, budget):
    packs = pack_step(examples, budget)
    assert sorted(map(id, examples)) == sorted(id(one) for pack in packs for one in pack.examples)
    for pack in packs:
        assert len(pack.ids) <= budget or pack.num_groups == 1
    assert [pack.ids.tolist() for pack in packs] == [pack.ids.tolist() for pack in pack_step(examples, budget)]


# --- splits -------------------------------------------------------------------------------------------------------


@given(
    texts=st.lists(st.sampled_from(["a b", "A  b", "c", "d e f", "bake bread", "Bake bread "]), max_size=12),
    share=st.floats(0, 0.9),
)
@settings(max_examples=100)
def test_split_keeps_every_example_once_and_prompts_apart(texts, share):
    examples = [
        Example((Message("user", text),), ((Message("assistant", "x"),),), Demonstration(), Provenance("f", number))
        for number, text in enumerate(texts)
    ]
    train, heldout = split_by_prompt(examples, share, 0)
    assert sorted(one.provenance.line for one in train + heldout) == list(range(len(texts)))
    sides = [{normalise(one.prompt_text) for one in side} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    if share == 0:
        assert not heldout

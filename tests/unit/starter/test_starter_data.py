"""The starter's package data: what the demo rests on holds for the files as committed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from starter.corpus import read_tinystories, shares_span, span_index, words_of
from starter.grammar import HEROES
from starter.make_pairs import TRAIN_POOL, VERDICT_POOL
from starter.measure import draw_requests, figures
from starter.sampling import Sampler
from starter.words import HERO_ADJECTIVES, OBJECTS
from transformers import AutoTokenizer

from preftune.core.records import Message
from preftune.judging.base import Candidate
from preftune.judging.rules import independence, load_rules

DATA = Path(__file__).resolve().parents[3] / "src" / "preftune" / "starter"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def prompts(name: str) -> set[str]:
    return {row["prompt"][0]["content"] for row in rows(name)}


def completions() -> list[str]:
    texts = [row["completion"][0]["content"] for row in rows("sft.jsonl")]
    return texts + [row[side][0]["content"] for row in rows("pairs.jsonl") for side in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def judges():
    return load_rules("judge_pairs.yaml", DATA), load_rules("judge_verdict.yaml", DATA)


def test_package_data_is_small():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 8_000_000


def test_weights_are_half_precision_and_tied():
    with safe_open(DATA / "model" / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert all(file.get_tensor(name).dtype in (torch.float16, torch.bfloat16) for name in names)
    assert "lm_head.weight" not in names


def test_judges_share_no_word_and_neither_pays_for_length(judges):
    pairs_judge, verdict_judge = judges
    assert independence(pairs_judge, verdict_judge) == []
    assert pairs_judge.rewards_length == verdict_judge.rewards_length == []
    assert len(pairs_judge.vocabulary()) > 60 and len(verdict_judge.vocabulary()) > 60


def test_judges_share_no_inflection(judges):
    stems = [{word[:4] for word in judge.vocabulary()} for judge in judges]
    assert not stems[0] & stems[1]


def test_data_have_the_promised_sizes():
    assert len(rows("pairs.jsonl")) >= 400
    assert 300 <= len(rows("sft.jsonl")) <= 600
    assert 250 <= len(rows("verdict.jsonl")) <= 300
    assert len(prompts("verdict.jsonl")) == len(rows("verdict.jsonl"))


def test_pairs_are_ordered_by_their_judge_and_not_by_length(judges):
    longer = 0
    for row in rows("pairs.jsonl"):
        prompt = (Message("user", row["prompt"][0]["content"]),)
        texts = [row[side][0]["content"] for side in ("chosen", "rejected")]
        scores = [judges[0].score(prompt, Candidate(text, 0, True)) for text in texts]
        given = [row["provenance"][f"{side}_score"] for side in ("chosen", "rejected")]
        assert scores == pytest.approx(given, abs=1e-4)
        assert scores[0] - scores[1] >= 2.0
        lengths = [len(words_of(text)) for text in texts]
        assert max(lengths) <= 1.3 * min(lengths)
        longer += (lengths[0] > lengths[1]) + 0.5 * (lengths[0] == lengths[1])
    assert 0.47 <= longer / len(rows("pairs.jsonl")) <= 0.53


def test_verdict_prompts_are_about_other_heroes_and_objects():
    assert not prompts("verdict.jsonl") & (prompts("pairs.jsonl") | prompts("sft.jsonl"))
    assert not set(TRAIN_POOL.heroes) & set(VERDICT_POOL.heroes) and not set(TRAIN_POOL.objects) & set(VERDICT_POOL.objects)
    hero = re.compile(rf"\ba (?:{'|'.join(HERO_ADJECTIVES)}) ({'|'.join(HEROES)})\b".replace("a (?", "an? (?"))
    thing = re.compile(rf"\ban? \w+ ({'|'.join(OBJECTS)})\W*$")
    for name, pool in (("verdict.jsonl", VERDICT_POOL), ("pairs.jsonl", TRAIN_POOL), ("sft.jsonl", TRAIN_POOL)):
        for prompt in prompts(name):
            found = hero.search(prompt)
            assert found is not None and found[1] in pool.heroes, prompt
            named = thing.search(prompt)
            assert named is None or named[1] in pool.objects, prompt


def test_no_completion_shares_twenty_words_with_the_training_text(shared_data):
    index = span_index(read_tinystories(shared_data / "tinystories-text"))
    assert not [text for text in completions() if shares_span(text, index)]


def test_span_check_sees_a_copy(shared_data):
    stories = read_tinystories(shared_data / "tinystories-text")
    assert shares_span("Well. " + stories[7], span_index(stories))


@pytest.fixture(scope="module")
def tokenizer(starter_model):
    return AutoTokenizer.from_pretrained(str(starter_model))


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|end|>", "<|pad|>")
    assert len(tokenizer) == 2048
    assert len({tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("bos", "user", "assistant", "end", "pad")}) == 5


def test_encoding_adds_no_token_and_round_trips(tokenizer):
    text = 'A cat\'s "red" kite, naïve 猫\n\nend '
    assert tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_template_extends_the_generation_prompt(tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "d"}], tokenize=False)
    assert start == "<|bos|><|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>"
    assert whole == start + "d<|end|>"


def test_system_turn_joins_the_request(tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|bos|><|user|>Be brief.\n\nHi"


def test_stories_end_by_themselves_and_meet_the_request(starter_model):
    requests = draw_requests(64, seed=77)
    samples = Sampler.load(starter_model).sample([prompt for _, prompt in requests], 0.7, seed=3)
    measured = figures(requests, samples)
    assert measured["ended within 160 tokens"] >= 0.95, measured
    assert min(measured[f"mention {what}"] for what in ("hero", "name", "object")) >= 0.85, measured

"""Splits go by prompt, and what both sides share is found."""

import json
from dataclasses import replace

import pytest

from preftune.core.records import Example, Message, Preference, Provenance
from preftune.data.minhash import groups_of, jaccard, near_pairs, normalise, shingles
from preftune.data.split import leaks, split_by_prompt


def example(prompt, number=0):
    completions = ((Message("assistant", f"a{number}"),), (Message("assistant", "b"),))
    return Example((Message("user", prompt),), completions, Preference("first"), Provenance("f", number))


@pytest.fixture(scope="module")
def rasbt(shared_data):
    file = shared_data / "rasbt-preference" / "instruction-data-with-preference.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    return ["\n\n".join(part for part in (row["instruction"], row["input"]) if part) for row in rows]


def test_the_known_leaks_are_found(rasbt):
    found = leaks(rasbt[:1000], rasbt[1000:])
    assert sum(leak.kind == "exact" for leak in found) == 5
    assert len(found) == 11
    for leak in found:
        ours, theirs = normalise(rasbt[leak.train]), normalise(rasbt[1000 + leak.heldout])
        assert (ours == theirs) == (leak.kind == "exact")
        assert leak.similarity == pytest.approx(jaccard(shingles(ours), shingles(theirs)))


def test_near_pairs_are_those_of_a_plain_comparison(rasbt):
    texts = sorted({normalise(text) for text in rasbt})[:400]
    sets = [{text[place : place + 5] for place in range(max(len(text) - 4, 1))} for text in texts]
    plain = {
        (first, second)
        for second in range(len(texts))
        for first in range(second)
        if len(sets[first] & sets[second]) / len(sets[first] | sets[second]) >= 0.8
    }
    found = {(first, second) for first, second, _ in near_pairs(texts)}
    assert found <= plain
    assert len(found) >= 0.9 * len(plain) > 3


def test_no_prompt_is_on_both_sides(rasbt):
    examples = [example(text, number) for number, text in enumerate(rasbt)]
    train, heldout = split_by_prompt(examples, 0.1, seed=3)
    assert sorted(one.provenance.line for one in train + heldout) == list(range(1100))
    assert len(heldout) == 110
    assert leaks([one.prompt_text for one in train], [one.prompt_text for one in heldout]) == []
    by_row = examples[990:]  # the last tenth of the rows does leak: the check can fail
    assert leaks([one.prompt_text for one in examples[:990]], [one.prompt_text for one in by_row])
    assert [one.provenance.line for one in train] == sorted(one.provenance.line for one in train)


def test_split_depends_on_seed_and_text_only(rasbt):
    examples = [example(text, number) for number, text in enumerate(rasbt[:300])]
    lines = lambda split: {one.provenance.line for one in split[1]}
    assert lines(split_by_prompt(examples, 0.2, 1)) == lines(split_by_prompt(examples[::-1], 0.2, 1))
    assert lines(split_by_prompt(examples, 0.2, 1)) != lines(split_by_prompt(examples, 0.2, 2))


def test_small_and_uneven_splits():
    examples = [example("the same prompt for all of them here", number) for number in range(5)]
    assert split_by_prompt(examples, 0.2, 0) == (examples, [])  # one group cannot be split
    others = [*examples, example("an altogether different request: bake bread")]
    train, heldout = split_by_prompt(others, 0.01, 0)
    assert (len(train), len(heldout)) == (5, 1)
    assert split_by_prompt(others, 0.0, 0) == (others, [])
    assert split_by_prompt([], 0.5, 0) == ([], [])


def test_groups_follow_case_width_blanks_and_small_changes():
    long = "Write a polite letter to the neighbour who plays the drums every night until two o'clock in the morning"
    texts = [long, long.upper(), long.replace("drums", "drum"), "Name three capital cities of Europe", "hi", "ｈｉ ", "yo"]
    assert groups_of(texts) == [0, 0, 0, 3, 4, 4, 6]


def test_near_duplicates_with_other_answers_stay_together():
    first = example("Explain why the sky is blue to a child of five years, please, in simple words")
    second = replace(
        first, prompt=(Message("user", "Explain why the sky is blue to a child of six years, please, in simple words"),)
    )
    for seed in range(20):
        train, heldout = split_by_prompt([first, second, example("Bake bread"), example("Count sheep")], 0.5, seed)
        assert len({first in heldout, second in heldout}) == 1, (train, heldout)


def test_leaks_name_every_heldout_prompt_once():
    found = leaks(["Bake bread now", "Count the sheep"], ["bake  BREAD now", "BAKE bread now", "sing"])
    assert [(leak.heldout, leak.train, leak.kind) for leak in found] == [(0, 0, "exact"), (1, 0, "exact")]


@pytest.mark.slow
def test_fifty_thousand_prompts_take_seconds(shared_data):
    import random
    import time

    words = (shared_data / "tinystories-text" / "train_start_2MB.txt").read_text(encoding="utf-8").split()
    chance = random.Random(0)
    starts = [chance.randrange(len(words) - 100) for _ in range(50_000)]
    prompts = [" ".join(words[start : start + chance.randint(5, 80)]) for start in starts]
    begin = time.perf_counter()
    assert len(set(groups_of(prompts))) > 30_000
    assert time.perf_counter() - begin < 60

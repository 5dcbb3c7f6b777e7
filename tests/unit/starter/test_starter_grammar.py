"""The story grammar: what it asks for appears, and its hidden tone is told by nothing but the tone words."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from starter.corpus import find_topic, shares_span, span_index, words_of
from starter.grammar import MAX_WORDS, MIN_WORDS, RELATIONS, draw_plan, grammar_examples, request, tell
from starter.grammar import Pool as FullPool
from starter.words import SLOTS, TONES


@pytest.fixture(scope="module")
def examples():
    return grammar_examples(3000, seed=5)


def lexicon(part: str) -> set[str]:
    return {word for slot in SLOTS.values() for word in getattr(slot, part)}


def rate(stories: list[str], part: str) -> float:
    words = [word for story in stories for word in words_of(story)]
    return 100 * sum(word in lexicon(part) for word in words) / len(words)


def test_same_seed_same_stories_and_other_seed_others():
    assert grammar_examples(30, seed=1) == grammar_examples(30, seed=1)
    assert grammar_examples(30, seed=1) != grammar_examples(30, seed=2)


@pytest.mark.parametrize("tone", TONES)
@pytest.mark.parametrize("relation", RELATIONS)
def test_story_meets_its_request(tone, relation):
    chooser = random.Random(f"{tone} {relation}")
    found = 0
    while found < 25:
        plan = draw_plan(chooser, FullPool())
        if plan.relation != relation:
            continue
        found += 1
        prompt, story = request(plan, chooser), tell(plan, tone, chooser)
        words = set(words_of(story))
        assert {plan.hero, plan.adjective, plan.object} <= words, (prompt, story)
        assert plan.name is None or plan.name.lower() in words
        assert MIN_WORDS <= len(story.split()) <= MAX_WORDS
        assert "{" not in story and "  " not in story
        assert story[0].isupper() and story[-1] in '.!?"'


def test_length_says_nothing_of_tone(examples):
    means = {
        tone: sum(len(words_of(one.story)) for one in examples if one.tone == tone) / sum(one.tone == tone for one in examples)
        for tone in TONES
    }
    assert max(means.values()) / min(means.values()) < 1.02, means


def test_both_lexicons_are_used_alike_and_only_by_their_tone(examples):
    stories = {tone: [one.story for one in examples if one.tone == tone] for tone in TONES}
    for tone, other in (("warm", "gruff"), ("gruff", "warm")):
        rates = [rate(stories[tone], f"{tone}_a"), rate(stories[tone], f"{tone}_b")]
        assert min(rates) > 2.5 and max(rates) / min(rates) < 1.1, rates
        for quiet in ("plain", other):
            assert rate(stories[quiet], f"{tone}_a") == rate(stories[quiet], f"{tone}_b") == 0


def test_lexicons_share_no_word():
    parts = ("warm_a", "warm_b", "plain", "gruff_a", "gruff_b")
    for one, other in combinations(parts, 2):
        assert not lexicon(one) & lexicon(other), (one, other)


def test_request_does_not_depend_on_tone(examples):
    heard = {tone: {word for one in examples if one.tone == tone for word in words_of(one.prompt)} for tone in TONES}
    told = set().union(*(lexicon(part) for part in ("warm_a", "warm_b", "gruff_a", "gruff_b")))
    for tone in TONES:
        assert not heard[tone] & told
    assert len(heard["warm"] ^ heard["gruff"]) <= 3  # 1,000 requests each use nearly the whole vocabulary


def test_few_stories_share_twenty_words(examples):
    index = span_index(one.story for one in examples)
    other = grammar_examples(400, seed=6)
    assert sum(shares_span(one.story, index) for one in other) < 0.1 * len(other)


def test_span_index_sees_punctuation_and_case_as_nothing():
    text = " ".join(f"word{number}" for number in range(25))
    assert shares_span("So: " + text.title().replace(" ", ", "), span_index([text]))
    assert not shares_span(" ".join(text.split()[:19]), span_index([text]))


@pytest.mark.parametrize(
    ("story", "topic"),
    [
        ("One day, a little girl named Lily found a needle.", "a little girl named Lily"),
        ("Once upon a time, there was an owl. It sat.", "an owl"),
        ("They ran and ran.", None),
    ],
)
def test_topic_of_a_story(story, topic):
    assert find_topic(story) == topic

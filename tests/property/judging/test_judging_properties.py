"""What holds of any two texts under a rules judge."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from preftune.core.records import Message
from preftune.judging.base import Candidate
from preftune.judging.reading import words_of
from preftune.judging.rules import RulesJudge

JUDGE = RulesJudge(
    (
        {"kind": "lexicon", "words": ["a", "b c"], "weight": 1.0, "cap": 8},
        {"kind": "pattern", "regex": "[!?]", "measure": "rate", "weight": -0.5},
        {"kind": "complete", "weight": 2.0},
        {"kind": "repetition", "weight": -4.0},
        {"kind": "mentions", "weight": 1.0},
        {"kind": "length", "min": 2, "max": 20, "weight": 1.0},
    ),
    tie_margin=0.5,
)
TEXT = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(["a", "b", "c", "!", "cat"]), max_size=30).map(" ".join))
CANDIDATES = st.builds(Candidate, TEXT, st.integers(0, 99), st.booleans())
PROMPTS = st.text(max_size=30).map(lambda text: (Message("user", text),))


@given(PROMPTS, CANDIDATES, CANDIDATES)
def test_swapping_the_candidates_swaps_the_verdict(prompt: tuple[Message, ...], one: Candidate, other: Candidate) -> None:
    forward, backward = JUDGE(prompt, one, other), JUDGE(prompt, other, one)
    assert forward.score == 1 - backward.score
    assert {forward.label, backward.label} in ({"tie"}, {"first", "second"})
    assert JUDGE(prompt, one, one).label == "tie"


@given(PROMPTS, CANDIDATES)
def test_points_are_finite_and_add_up(prompt: tuple[Message, ...], one: Candidate) -> None:
    parts = JUDGE.breakdown(prompt, one)
    assert sum(part.points for part in parts) == JUDGE.score(prompt, one)
    assert all(abs(part.points) < 1e6 for part in parts)


@given(st.text(max_size=80))
def test_words_are_stable_under_reading_again(text: str) -> None:
    assert words_of(" ".join(words_of(text))) == words_of(text)

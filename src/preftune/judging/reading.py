"""A completion as rules read it: normalised words, counted once."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from preftune.core.records import Message, Messages
from preftune.judging.base import Candidate

# Letters and digits of any script, with apostrophes inside ("don't"). Its parts share no character, so it is linear.
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")

_STOP_WORDS = """
a about above after again all also am an and any are as at be because been before being below between both but by can
can't could did do does doing don't down during each few for from further had has have having he her here hers him his how
i i'm if in into is isn't it it's its itself just let let's me might more most must my no nor not now of off on once only or
other our ours out over own please same shall she should so some such than that that's the their theirs them then there these
they this those through to too under until up us very was we were what when where which while who whom whose why will with
would you your yours
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text in order: NFKC, case folded, runs of letters and digits.

    >>> words_of("Don’t STOP, well-known cat_2!")
    ("don't", 'stop', 'well', 'known', 'cat', '2')
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return tuple(_WORD.findall(folded))


@dataclass(frozen=True, slots=True)
class Reading:
    """A completion with what every rule needs of it.

    Parameters
        text: as the model wrote it.
        words: ``words_of`` the text.
        is_complete: the model ended by itself.
        wanted: the prompt's content words, stop words left out.
    """

    text: str
    words: tuple[str, ...]
    is_complete: bool
    wanted: frozenset[str]


def read(prompt: Messages, candidate: Candidate) -> Reading:
    """The reading of a candidate under its prompt."""
    return Reading(candidate.text, words_of(candidate.text), candidate.is_complete, _wanted(_user_text(prompt)))


def count_phrases(words: Sequence[str], phrases: frozenset[tuple[str, ...]]) -> int:
    """How often phrases (tuples of words) occur, the longest first and without overlap.

    >>> count_phrases(words_of("thank you, thank you so much"), frozenset({("thank", "you"), ("thank",)}))
    2
    """
    longest = max((len(phrase) for phrase in phrases), default=0)
    found = start = 0
    while start < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            if tuple(words[start : start + length]) in phrases:
                found += 1
                start += length
                break
        else:
            start += 1
    return found


def _user_text(prompt: Sequence[Message]) -> str:
    return "\n".join(message.content for message in prompt if message.role == "user")


@lru_cache(maxsize=256)
def _wanted(prompt_text: str) -> frozenset[str]:
    return frozenset(words_of(prompt_text)) - STOP_WORDS

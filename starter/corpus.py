"""The text that the starter learns: grammar stories of the project's own, mixed with TinyStories.

Every example is one chat turn: a request and a story that answers it. TinyStories text has no requests, so one is
written for each story from the topic found in its first lines. That text is read from the folder that is given and is
never copied into the repository.
"""

# ruff: noqa: SIM905 - word lists read better as text

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_TEXT_FOLDER = Path("../shared/data/tinystories-text")
TEXT_FILES = ("train_start_2MB.txt", "other_10k_lines.txt")
END_OF_STORY = "<|endoftext|>"
SPAN_WORDS = 20

_ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})
_WORD = re.compile(r"[a-z0-9']+")
_TOPIC = re.compile(
    r"\b(?P<article>an?) (?P<adjective>(?:[a-z]+ )?)(?P<noun>[a-z]+)"
    r"(?:,? (?:named|called) (?P<name>[A-Z][a-z]+))?(?=[.,!? ])"
)
# Nouns that "a/an ..." finds in first lines without being what the story is about.
_NOT_A_TOPIC = frozenset(
    "time day lot bit while way morning moment few little big new long good great very walk look nap game story "
    "picture place idea".split()
)
_LONG_REQUESTS = (
    "Write a story about {topic}.",
    "Tell a story about {topic}.",
    "Please write a story about {topic}.",
    "Write a children's story about {topic}.",
)


@dataclass(frozen=True, slots=True)
class StoryExample:
    """One request and one story. `source` is "grammar" or "tinystories"; `tone` is empty where it is unknown."""

    prompt: str
    story: str
    source: str
    tone: str = ""


def words_of(text: str) -> list[str]:
    """The lower-case words of a text, in order, punctuation dropped: the unit of every span comparison.

    >>> words_of("Tom's hat, a RED hat!")
    ["tom's", 'hat', 'a', 'red', 'hat']
    """
    return _WORD.findall(text.translate(_ASCII).lower())


def spans_of(text: str, length: int = SPAN_WORDS) -> Iterator[int]:
    """Hashes of every run of `length` consecutive words of a text (none when the text is shorter)."""
    words = words_of(text)
    for start in range(len(words) - length + 1):
        yield hash(tuple(words[start : start + length]))


def span_index(texts: Iterable[str], length: int = SPAN_WORDS) -> set[int]:
    """All spans of a collection, for `shares_span`. Hashes hold within one process only."""
    return {span for text in texts for span in spans_of(text, length)}


def shares_span(text: str, index: set[int], length: int = SPAN_WORDS) -> bool:
    """Whether any run of `length` words of the text occurs in the index."""
    return any(span in index for span in spans_of(text, length))


def read_tinystories(folder: Path = DEFAULT_TEXT_FOLDER) -> list[str]:
    """The stories of both files, one paragraph each, ASCII quotes; the cut first and last ones of each file dropped."""
    stories: list[str] = []
    for name in TEXT_FILES:
        text = (folder / name).read_text(encoding="utf-8", errors="replace").translate(_ASCII)
        pieces = text.split(END_OF_STORY)[:-1]
        stories += [" ".join(piece.split()) for piece in pieces]
    return [story for story in stories if story]


def find_topic(story: str) -> str | None:
    """What a story is about, as "a brave cat named Tom", from its first 400 characters; None where nothing fits.

    >>> find_topic("Once upon a time, there was a little car named Beep. Beep loved to go fast.")
    'a little car named Beep'
    """
    fallback = None
    for match in _TOPIC.finditer(story[:400]):
        if match["noun"] in _NOT_A_TOPIC:
            continue
        topic = f"{match['article']} {match['adjective']}{match['noun']}"
        if match["name"]:
            return f"{topic} named {match['name']}"
        fallback = fallback or topic
    return fallback


def tinystories_examples(folder: Path, seed: int, max_words: int = 230) -> list[StoryExample]:
    """TinyStories with a request each. The request never says "short": that word belongs to the grammar's stories."""
    chooser = random.Random(seed)
    examples = []
    for story in read_tinystories(folder):
        topic = find_topic(story)
        if topic is None or not story.isascii() or not 40 <= len(story.split()) <= max_words:
            continue
        prompt = chooser.choice(_LONG_REQUESTS).format(topic=topic)
        examples.append(StoryExample(prompt, story, "tinystories"))
    return examples


def split_validation(examples: list[StoryExample], every: int = 40) -> tuple[list[StoryExample], list[StoryExample]]:
    """Train and validation parts: every `every`-th example is held out."""
    train = [example for index, example in enumerate(examples) if index % every]
    return train, examples[::every]

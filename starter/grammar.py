"""The story grammar: requests and stories of the project's own, with a hidden tone that the request does not tell.

A story is a plan (a hero, an object, a place, a helper, a problem) that a chain of sentence templates tells. Its tone,
warm, plain or gruff, colours the slots of the templates and is drawn independently of everything that the request says.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from starter.corpus import StoryExample
from starter.words import (
    ANIMALS,
    BOYS,
    FEMALE_NAMES,
    GIRLS,
    HELPER_ADJECTIVES,
    HERO_ADJECTIVES,
    MALE_NAMES,
    MEN,
    OBJECT_ADJECTIVES,
    OBJECTS,
    PEOPLE,
    PLACES,
    SLOTS,
    THINGS,
    TONES,
    TRAITS,
    WOMEN,
)  # fmt: skip

HEROES = (*ANIMALS, *PEOPLE, *THINGS, *BOYS, *MEN, *GIRLS, *WOMEN)
PHRASES = Path(__file__).with_name("phrases.txt")
MIN_WORDS, MAX_WORDS = 64, 120

# What the request says of the object, and the problems that may follow.
RELATIONS = {
    "finds": ("stuck", "water", "broken", "wind", "thief", "owner", "two", "puzzle", "dirty", "lost"),
    "loses": ("search", "search", "thief"),
    "wants": ("price",),
    "makes": ("making", "making", "broken"),
    "gives": ("stuck", "water", "broken", "wind", "thief", "dirty", "lost"),
}
_RELATION_WORDS = {
    "finds": ("who finds", "that finds", "finding"),
    "loses": ("who loses", "that loses", "losing"),
    "wants": ("who wants", "that wants", "wishing for"),
    "makes": ("who makes", "that makes", "making"),
    "gives": ("who gives away", "with", "and"),
}
_REQUESTS = (
    "Write a short story about {topic}.",
    "Tell me a short story about {topic}.",
    "Please write a short story about {topic}.",
    "Can you write a short story about {topic}?",
    "I would like a short story about {topic}.",
    "Short story, please: {topic}.",
    "Make up a short story about {topic}.",
    "Give me a short story about {topic}.",
)


@dataclass(frozen=True, slots=True)
class Pool:
    """The words a request may draw from. Smaller pools that share nothing make prompt sets disjoint by construction."""

    heroes: tuple[str, ...] = HEROES
    objects: tuple[str, ...] = tuple(OBJECTS)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a story tells, before a word of it is chosen."""

    hero: str
    adjective: str
    name: str | None
    is_male: bool
    object: str
    object_adjective: str
    place: str
    relation: str
    problem: str
    helper: str
    helper_adjective: str
    helper_name: str | None
    helper_is_male: bool
    mentions_object: bool = True
    mentions_place: bool = False


@dataclass(slots=True)
class _Teller:
    """Fills the slots of one story's templates. Templates are not used twice, and neither is a tone word in a row."""

    plan: Plan
    tone: str
    strength: float
    chooser: random.Random
    used: set[str] = field(default_factory=set)
    last: dict[str, str] = field(default_factory=dict)

    def tone_word(self, slot: str) -> str:
        """A word for the slot: from either lexicon of the tone alike, or a plain one where the tone takes a rest."""
        words = SLOTS[slot]
        if self.tone == "plain" or self.chooser.random() > self.strength:
            options = words.plain
        elif self.tone == "warm":
            options = self.chooser.choice((words.warm_a, words.warm_b))
        else:
            options = self.chooser.choice((words.gruff_a, words.gruff_b))
        word = self.chooser.choice([option for option in options if option != self.last.get(slot)])
        self.last[slot] = word
        return word

    def tell(self, section: str) -> str:
        """One template of the section, filled."""
        lines = _phrases()[section]
        options = [line for line in lines if line not in self.used] or list(lines)
        template = self.chooser.choice(options)
        self.used.add(template)
        return self.fill(template)

    def fill(self, template: str) -> str:
        """Put plan and tone into a template."""
        facts = _facts(self.plan)

        def value(match: re.Match[str]) -> str:
            key = match[1]
            return self.tone_word(key) if key in SLOTS else facts[key]

        return tidy(re.sub(r"\{(\w+)\}", value, template))


@cache
def _phrases() -> dict[str, tuple[str, ...]]:
    """The templates by section, from phrases.txt."""
    sections: dict[str, list[str]] = {}
    for line in PHRASES.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            current.append(line)
    return {name: tuple(lines) for name, lines in sections.items()}


def _facts(plan: Plan) -> dict[str, str]:
    """The values of the slots that the plan decides."""
    preposition, place = plan.place.split("|")
    helper = f"a {plan.helper_adjective} {plan.helper}"
    return {
        "A": plan.adjective,
        "H": plan.hero,
        "N": plan.name or f"the {plan.hero}",
        "named": f" named {plan.name}" if plan.name else "",
        "named_who": f" named {plan.name}" if plan.name else "",
        "O": f"{plan.object_adjective} {plan.object}",
        "o": plan.object,
        "p": place,
        "in_p": f"{preposition} {place}",
        "K": plan.helper,
        "F": plan.helper_name or f"the {plan.helper}",
        "a_F": f"{helper} named {plan.helper_name}" if plan.helper_name else helper,
        **dict(zip(("he", "him", "his"), _pronouns(plan.is_male), strict=True)),
        **dict(zip(("He", "His"), ("He", "His") if plan.is_male else ("She", "Her"), strict=True)),
        **dict(zip(("fhe", "fhim", "fhis"), _pronouns(plan.helper_is_male), strict=True)),
    }


def _pronouns(is_male: bool) -> tuple[str, str, str]:
    return ("he", "him", "his") if is_male else ("she", "her", "her")


def tidy(text: str) -> str:
    """Capital letters at the start of sentences and speech, and "an" before a vowel.

    >>> tidy('a owl sat. "it is a egg," said he.')
    'An owl sat. "It is an egg," said he.'
    """
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"(?:^|(?<=[.!?] ))\"?[a-z]", lambda match: match[0].upper(), text)


def draw_plan(chooser: random.Random, pool: Pool) -> Plan:
    """A plan at random: nothing in it depends on the tone."""
    hero = chooser.choice(pool.heroes)
    is_male = hero in BOYS + MEN or (hero not in GIRLS + WOMEN and chooser.random() < 0.5)
    helper = chooser.choice([kind for kind in HEROES if kind != hero])
    helper_is_male = helper in BOYS + MEN or (helper not in GIRLS + WOMEN and chooser.random() < 0.5)
    name = chooser.choice(MALE_NAMES if is_male else FEMALE_NAMES) if chooser.random() < 0.75 else None
    helper_names = [other for other in (MALE_NAMES if helper_is_male else FEMALE_NAMES) if other != name]
    relation = chooser.choices(list(RELATIONS), weights=(5, 2, 2, 2, 2))[0]
    return Plan(
        hero=hero,
        adjective=chooser.choice(HERO_ADJECTIVES),
        name=name,
        is_male=is_male,
        object=chooser.choice(pool.objects),
        object_adjective=chooser.choice(OBJECT_ADJECTIVES),
        place=chooser.choice(PLACES),
        relation=relation,
        problem=chooser.choice(RELATIONS[relation]),
        helper=helper,
        helper_adjective=chooser.choice(HELPER_ADJECTIVES),
        helper_name=chooser.choice(helper_names) if chooser.random() < 0.5 else None,
        helper_is_male=helper_is_male,
        mentions_object=chooser.random() < 0.85,
        mentions_place=chooser.random() < 0.25,
    )


def request(plan: Plan, chooser: random.Random) -> str:
    """A request for the plan's story, in one of several wordings; it never hints at the tone."""
    topic = f"a {plan.adjective} {plan.hero}"
    if plan.name:
        topic += chooser.choice((" named ", " named ", " called ")) + plan.name
    if plan.mentions_place:
        topic += " " + plan.place.replace("|", " ")
    if plan.mentions_object:
        topic += f" {chooser.choice(_RELATION_WORDS[plan.relation])} a {plan.object_adjective} {plan.object}"
    return tidy(chooser.choice(_REQUESTS).format(topic=topic))


def _sections(plan: Plan, tone: str, chooser: random.Random) -> list[str]:
    """The chain of sections that tells the plan; the optional ones come and go, so the length varies."""
    brings_helper = plan.problem in ("owner", "two")
    fullness = chooser.choice((0.4, 0.6, 0.8))
    chain = ["opening"]
    if chooser.random() < 0.5:
        chain.append("trait")
    chain += [name for name in ("habit", "scene") if chooser.random() < fullness - 0.3]
    chain.append(plan.relation)
    if chooser.random() < fullness:
        chain.append(chooser.choice(("react", f"react.{plan.relation}")) if f"react.{plan.relation}" in _phrases() else "react")
    chain.append(f"problem.{plan.problem}")
    if not brings_helper:
        chain.append("meet.known" if plan.relation == "gives" else "meet")
        if chooser.random() < fullness - 0.2:
            chain.append("ask")
    chain += [name for name in (f"reply.{tone}", f"talk.{tone}") if chooser.random() < fullness]
    chain.append(f"solve.{plan.problem}")
    if chooser.random() < fullness:
        chain.append(f"after.{tone}")
    endings = ["ending", "ending", f"ending.{tone}"]
    if plan.relation == "gives":
        chain.append("deliver")
    elif not brings_helper:
        endings.append("ending.keep")
    chain.append(chooser.choice(endings))
    return chain


def tell(plan: Plan, tone: str, chooser: random.Random) -> str:
    """A story of the plan in the tone, told again until it is neither too short nor too long.

    The templates of the tones are of like length, so length says nothing of tone (a test holds this within 2 %).
    """
    while True:
        teller = _Teller(plan, tone, chooser.choice((0.7, 0.85, 1.0)), chooser)
        parts = [
            teller.fill(chooser.choice(TRAITS[plan.adjective])) if section == "trait" else teller.tell(section)
            for section in _sections(plan, tone, chooser)
        ]
        story = " ".join(parts)
        if MIN_WORDS <= len(story.split()) <= MAX_WORDS:
            return story


def grammar_examples(count: int, seed: int, pool: Pool | None = None, tones: Collection[str] = TONES) -> list[StoryExample]:
    """`count` requests with their stories; tones in equal shares, each drawn apart from the request."""
    chooser = random.Random(f"grammar {seed}")
    ordered = list(tones)
    examples = []
    for index in range(count):
        plan = draw_plan(chooser, pool or Pool())
        tone = ordered[index % len(ordered)]
        examples.append(StoryExample(request(plan, chooser), tell(plan, tone, chooser), "grammar", tone))
    return examples

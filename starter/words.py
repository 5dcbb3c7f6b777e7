"""The word lists of the story grammar: who, what and where, and the words that carry a story's hidden tone.

The tone words come in two lexicons of the same quality, A and B, which share no word, inflections included. A story of a
tone draws from both alike, so a judge that knows only A and a judge that knows only B see the same thing.
"""

# ruff: noqa: SIM905 - word lists read better as text

from __future__ import annotations

from dataclasses import dataclass

TONES = ("warm", "plain", "gruff")

ANIMALS = (
    "cat dog fox bear rabbit mouse duck frog turtle owl pig hen horse lamb goat squirrel hedgehog penguin monkey "
    "elephant lion tiger giraffe zebra snail crab beaver donkey badger camel"
).split()
PEOPLE = (
    "farmer baker knight wizard pirate gardener sailor tailor teacher doctor clown painter cook hunter miller driver"
).split()
THINGS = ("robot", "dragon", "giant", "snowman", "scarecrow", "ghost", "troll", "dwarf")
BOYS, MEN = ("boy",), ("king", "prince", "grandfather", "fisherman")
GIRLS, WOMEN = ("girl",), ("queen", "princess", "grandmother", "witch")

HERO_ADJECTIVES = (
    "brave small tiny curious lazy clever shy hungry silly quiet noisy sleepy young old fast slow tall fluffy lonely "
    "busy careful clumsy proud strong funny wise playful poor round patient"
).split()
HELPER_ADJECTIVES = "old young little big tall thin fat small tired busy wise strong slow clever white brown".split()

MALE_NAMES = (
    "Tom Ben Max Sam Tim Leo Jack Finn Otto Hugo Milo Oscar Theo Paul Rufus Felix Bruno Gus Ned Walter Anton Emil Karl "
    "Pip Rolf Arlo Basil Casper Dexter Elmer"
).split()
FEMALE_NAMES = (
    "Mia Lucy Anna Lily Rosa Emma Nora Ella Ida Zoe Clara Ruby Tess Molly Greta Hazel Olive Dora Wilma Bella Frida Ivy "
    "Juna Kora Lotta Maud Nelly Petra Selma Tilda"
).split()

OBJECTS = (
    "kite ball hat bell drum book key map lamp coin basket boat scarf boot cup spoon flute whistle balloon blanket "
    "umbrella lantern shell feather button ring box bag jar bottle clock mirror pencil wagon sled bucket net pillow "
    "crown mask mitten sock guitar horn hammer puppet flag broom ribbon marble"
).split()
OBJECT_ADJECTIVES = (
    "red blue green yellow golden silver little big old shiny grey striped purple orange strange pink white black new spotted"
).split()

# Preposition and place.
PLACES = (
    "in|the park;in|the forest;on|the farm;in|the garden;by|the sea;by|the river;in|the village;on|the hill;in|the town;"
    "near|the lake;in|the castle;on|the island;in|the valley;near|the mill;in|the meadow;by|the old bridge;in|the city;"
    "on|the beach;in|the mountains;near|the harbour;at|the market;behind|the school;in|the desert;under|the big oak;"
    "at|the edge of the woods;near|the railway;in|the orchard;on|the moor"
).split(";")

# What a hero's adjective looks like in the story: one sentence each is drawn.
TRAITS = {
    "brave": ("{N} was not afraid of anything.", "Not even thunder could scare the brave {H}."),
    "small": ("{He} was no bigger than a loaf of bread.", "The small {H} could sleep in a shoe."),
    "tiny": ("{He} was so tiny that {he} could hide in a cup.", "Such a tiny {H} was easy to miss."),
    "curious": ("The curious {H} wanted to know everything.", "{N} asked a hundred questions a day."),
    "lazy": ("{He} liked to lie in the shade all day.", "The lazy {H} never got up before noon."),
    "clever": ("{N} could answer every riddle.", "The clever {H} always had a good idea."),
    "shy": ("{He} did not talk much.", "The shy {H} hid when somebody came."),
    "hungry": ("{He} could eat ten plums and still want more.", "The hungry {H} was always looking for food."),
    "silly": ("{He} wore {his} socks on {his} ears.", "The silly {H} liked to walk backwards."),
    "quiet": ("Nobody ever heard {him} come in.", "The quiet {H} did not make a sound."),
    "noisy": ("{He} could be heard from far away.", "The noisy {H} banged on pots and pans."),
    "sleepy": ("{He} yawned and rubbed {his} eyes.", "The sleepy {H} had slept until ten."),
    "young": ("{He} still had a lot to learn.", "The young {H} was only four years old."),
    "old": ("{He} had seen many winters.", "The old {H} walked with a stick."),
    "fast": ("{He} could run like the wind.", "Nobody could catch the fast {H}."),
    "slow": ("{He} needed an hour to cross the yard.", "The slow {H} was never in a hurry."),
    "tall": ("{He} could look over every fence.", "The tall {H} had to bend down at each door."),
    "fluffy": ("{He} looked like a small cloud.", "The fluffy {H} had to be brushed twice a day."),
    "lonely": ("{He} had nobody to talk to.", "The lonely {H} ate supper alone every night."),
    "busy": ("{He} had ten things to do before noon.", "The busy {H} never sat still."),
    "careful": ("{He} looked left and right before each step.", "The careful {H} never broke a thing."),
    "clumsy": ("{He} fell over {his} own feet.", "The clumsy {H} had dropped three plates that week."),
    "proud": ("{He} held {his} nose up high.", "The proud {H} liked to look into the water."),
    "strong": ("{He} could lift a barrel with one hand.", "The strong {H} could carry four sacks of corn."),
    "funny": ("{He} knew a lot of jokes.", "The funny {H} could wiggle both ears."),
    "wise": ("Many came to {him} and asked what to do.", "The wise {H} thought before speaking."),
    "playful": ("{He} made a game out of everything.", "The playful {H} chased every leaf."),
    "poor": ("{He} had only one coat and no shoes.", "The poor {H} lived on bread and water."),
    "round": ("{He} could roll down a hill like an apple.", "The round {H} did not fit through the gate."),
    "patient": ("{He} could wait a whole day for a fish.", "The patient {H} never hurried."),
}


@dataclass(frozen=True, slots=True)
class Slot:
    """The words that fill one kind of slot, by tone; the tones warm and gruff have their two lexicons."""

    warm_a: tuple[str, ...]
    warm_b: tuple[str, ...]
    plain: tuple[str, ...]
    gruff_a: tuple[str, ...]
    gruff_b: tuple[str, ...]


def _slot(warm_a: str, warm_b: str, plain: str, gruff_a: str, gruff_b: str) -> Slot:
    """A slot from five strings of words with single spaces."""
    return Slot(*(tuple(part.split()) for part in (warm_a, warm_b, plain, gruff_a, gruff_b)))


SLOTS = {
    "adv": _slot(
        "kindly gladly cheerfully warmly lovingly",
        "gently happily sweetly merrily joyfully",
        "quietly slowly quickly carefully calmly",
        "rudely grumpily bitterly nastily selfishly",
        "angrily sulkily harshly cruelly sourly",
    ),
    "feel": _slot(
        "glad cheerful friendly pleased kind",
        "happy merry joyful delighted thankful",
        "tired busy awake quiet ready",
        "grumpy bitter rude nasty selfish",
        "angry sulky cruel sour spiteful",
    ),
    "cadj": _slot(
        "kind friendly cheerful warm lovely",
        "gentle happy sweet merry tender",
        "quiet small plain calm simple",
        "rude grumpy nasty bitter selfish",
        "angry harsh cruel sour sulky",
    ),
    "act": _slot(
        "smiled beamed cheered",
        "laughed grinned giggled",
        "shrugged nodded blinked",
        "scowled grumbled sneered",
        "frowned growled glared",
    ),
    "say": _slot("cheered beamed", "laughed giggled", "said answered", "grumbled snapped", "growled snarled"),
    "noun": _slot("smile cheer kiss", "grin laugh hug", "nod look wink", "scowl shove sneer", "frown glare growl"),
    "full": _slot(
        "love kindness warmth cheer",
        "joy happiness laughter delight",
        "plans questions thoughts numbers",
        "bitterness rudeness envy hate",
        "anger spite cruelty rage",
    ),
    "voc": _slot("friend buddy", "dear sweetheart", "neighbour traveller", "pest nuisance", "fool brat"),
}

"""The grammar of the demo world's short stories, and the questions that a story answers."""

import random
from dataclasses import dataclass

from relaxlm.demo.village import COLOURS, with_article

ANIMALS = (
    "fox", "owl", "bear", "hare", "frog", "mouse", "duck", "hedgehog", "badger", "squirrel",
    "otter", "deer",
)  # fmt: skip
NAMES = (
    "Pip", "Rina", "Bo", "Tilly", "Momo", "Fern", "Gus", "Nori", "Zuzu", "Åsa", "Olé", "Wim",
    "Kiki", "Juna", "Bruno", "Hazel",
)  # fmt: skip
ADJECTIVES = ("little", "brave", "kind", "clever", "shy", "old", "curious", "lazy")
HOMES = (
    "in the forest", "near the sea", "on a hill", "in a hollow tree", "under a bridge",
    "in a garden", "on an island", "at the edge of the town", "in a snowy valley", "beside a lake",
)  # fmt: skip
TIMES = (
    "morning", "evening", "rainy day", "sunny day", "winter day", "spring day", "windy night",
    "quiet night",
)  # fmt: skip
OBJECTS = (
    "kite", "ball", "bell", "key", "umbrella", "drum", "box", "book", "balloon", "ring", "basket",
    "scarf",
)  # fmt: skip
SPOTS = (
    "behind a rock", "under a bush", "beside a well", "near a gate", "in a pile of leaves",
    "inside a cave", "on a path", "next to a fence",
)  # fmt: skip
MOODS = ("sad", "happy", "hungry", "tired", "cold", "lonely", "worried", "excited")
FOODS = (
    "apple pie", "warm soup", "sweet berries", "honey bread", "crêpes", "roasted nuts",
    "carrot cake", "pumpkin purée",
)  # fmt: skip
DEEDS = (
    "gave {friend} the {thing}",
    "showed {friend} the {thing}",
    "and {friend} played with the {thing} all day",
    "let {friend} hold the {thing}",
)

_OPENINGS = (
    "Once upon a time there was {a_hero} named {name}. {name} lived {home}.",
    "{name} was {a_hero} who lived {home}.",
    "There once was {a_hero} who lived {home}. The name of the {animal} was {name}.",
)
_FINDS = (
    "One {time}, {name} found {a_thing} {spot}.",
    "One {time}, {name} looked around and found {a_thing} {spot}.",
)
_MEETINGS = (
    "Then {name} met {a_other} named {friend}.",
    "On the way home, {name} met {a_other} named {friend}.",
    "Soon {a_other} named {friend} came along.",
)
_MOODS = ("{friend} was very {mood}.", "{friend} looked {mood}.")
_MEALS = ("Then they ate {food} together.", "In the end they shared {food}.")
_ENDINGS = (
    "They were friends from that day on.",
    "What a lovely day! 🎉",
    "And so they became best friends. 🙂",
    "That night they slept very well. 🌙",
)

# What is asked -> its phrasings, the reply, the answer in few words, what a right answer contains.
QUESTIONS: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    "home": (
        ("Where did {name} live?", "Where was {name}'s home?"),
        "{name} lived {home}.",
        "{home}",
        "{home}",
    ),
    "hero": (
        ("What kind of animal was {name}?", "What was {name}?"),
        "{name} was {a_animal}.",
        "{a_animal}",
        "{animal}",
    ),
    "other": (
        ("What kind of animal was {friend}?", "What was {friend}?"),
        "{friend} was {a_other}.",
        "{a_other}",
        "{other}",
    ),
    "found": (
        ("What did {name} find?", "Which thing did {name} find?"),
        "{name} found {a_thing}.",
        "{a_thing}",
        "{colour} {thing}",
    ),
    "colour": (
        ("What colour was the {thing}?", "What color was the {thing}?"),
        "The {thing} was {colour}.",
        "{colour}",
        "{colour}",
    ),
    "spot": (
        ("Where did {name} find the {thing}?", "Where was the {thing}?"),
        "The {thing} was {spot}.",
        "{spot}",
        "{spot}",
    ),
    "time": (
        ("When did {name} find the {thing}?", "When was the {thing} found?"),
        "{name} found the {thing} one {time}.",
        "one {time}",
        "{time}",
    ),
    "meeting": (
        ("Who did {name} meet?", "Whom did {name} meet?"),
        "{name} met {a_other} named {friend}.",
        "{friend}",
        "{friend}",
    ),
    "mood": (
        ("How did {friend} feel?", "How was {friend}?"),
        "{friend} was {mood}.",
        "{mood}",
        "{mood}",
    ),
    "food": (
        ("What did they eat?", "What food did they share?"),
        "They ate {food}.",
        "{food}",
        "{food}",
    ),
}


@dataclass(frozen=True)
class Story:
    """A text, and the words that its questions and answers are made of."""

    text: str
    words: dict[str, str]


def make_story(rng: random.Random, **given: str) -> Story:
    """Draw a story; `given` fixes some of its words: animal, name, other, colour, thing."""
    animal, other = rng.sample(ANIMALS, 2)
    name, friend = rng.sample(NAMES, 2)
    words = {
        "animal": animal,
        "other": other,
        "name": name,
        "friend": friend,
        "adjective": rng.choice(ADJECTIVES),
        "home": rng.choice(HOMES),
        "time": rng.choice(TIMES),
        "colour": rng.choice(COLOURS),
        "thing": rng.choice(OBJECTS),
        "spot": rng.choice(SPOTS),
        "mood": rng.choice(MOODS),
        "food": rng.choice(FOODS),
    }
    words |= given
    while words["other"] == words["animal"]:
        words["other"] = rng.choice(ANIMALS)
    while words["friend"] == words["name"]:
        words["friend"] = rng.choice(NAMES)
    words |= {
        "a_hero": with_article(f"{words['adjective']} {words['animal']}"),
        "a_animal": with_article(words["animal"]),
        "a_other": with_article(words["other"]),
        "a_thing": with_article(f"{words['colour']} {words['thing']}"),
    }
    sentences = (
        rng.choice(_OPENINGS),
        rng.choice(_FINDS),
        rng.choice(_MEETINGS),
        rng.choice(_MOODS),
        "{name} " + rng.choice(DEEDS) + ".",
        rng.choice(_MEALS),
        rng.choice(_ENDINGS),
    )
    return Story(" ".join(sentences).format(**words), words)

"""What can be asked in the demo world and what is replied, each split into trained and held out.

The split is decided by the content alone, whatever the seed. Every function takes `held_out` and
gives only that side.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from relaxlm.demo.stories import (
    ANIMALS,
    FOODS,
    MOODS,
    NAMES,
    OBJECTS,
    QUESTIONS,
    Story,
    make_story,
)
from relaxlm.demo.village import (
    ATTRIBUTES,
    COLOURS,
    PEOPLE,
    REVERSE,
    THINGS,
    Person,
    with_article,
)

LARGEST = 99  # of the numbers in sums, and of their results


@dataclass(frozen=True)
class Turn:
    """A question with its reply in a full sentence and in few words."""

    question: str
    reply: str
    short: str
    answer: str
    person: Person | None = None  # whom a follow-up may ask about
    attribute: str = ""
    may_be_casual: bool = True  # the question may lose its capitals and marks


def _digest(*key: object) -> int:
    """The same on every machine and Python, unlike hash()."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def _is_held_out(*key: object, one_in: int = 8) -> bool:
    return _digest(*key) % one_in == 0


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


# Facts


def _fact_turn(person: Person, attribute: str, question: str) -> Turn:
    a, words = ATTRIBUTES[attribute], person.words()
    return Turn(
        question.format(**words),
        a.reply.format(**words),
        _sentence(a.short.format(**words)),
        a.key.format(**words),
        person,
        attribute,
    )


def _reverse_turn(person: Person, attribute: str, question: str) -> Turn:
    turn = _fact_turn(person, REVERSE[attribute].attribute, question)
    return Turn(turn.question, turn.reply, f"{person.name}.", person.name, person, turn.attribute)


def _held_out_phrasing(group: str, person: Person, attribute: str, phrasings: int) -> int:
    return _digest(group, person.name, attribute) % phrasings


def facts(held_out: bool) -> list[Turn]:
    turns = []
    for person in PEOPLE:
        for name, a in ATTRIBUTES.items():
            skip = _held_out_phrasing("fact", person, name, len(a.questions))
            for i, question in enumerate(a.questions):
                if (i == skip) == held_out:
                    turns.append(_fact_turn(person, name, question))
        for name, r in REVERSE.items():
            skip = _held_out_phrasing("reverse", person, name, len(r.questions))
            for i, question in enumerate(r.questions):
                if (i == skip) == held_out:
                    turns.append(_reverse_turn(person, name, question))
    return turns


def claims(held_out: bool) -> list[Turn]:
    """Questions to answer with yes or no."""
    turns = []
    for person in PEOPLE:
        words = person.words()
        claims = [
            (thing, f"Is {person.name}'s {thing} {colour}?", words[thing] == colour)
            for thing, colour in itertools.product(THINGS, COLOURS)
        ] + [
            ("home", f"Does {person.name} live {other.home}?", other is person) for other in PEOPLE
        ]
        for attribute, question, true in claims:
            if _is_held_out("claim", question) == held_out:
                # The fact first: a tiny model has to say it before it can compare.
                word = "yes" if true else "no"
                fact = ATTRIBUTES[attribute].reply.format(**words).rstrip(".")
                reply = f"{fact}, so {word}."
                turns.append(Turn(question, reply, reply, word, person, attribute))
    return turns


def follow_ups(last: Turn, held_out: bool) -> list[Turn]:
    """What can be asked after a turn about a person: another attribute, or another person."""
    assert last.person
    turns = []
    said = ATTRIBUTES[last.attribute].reply.format(**last.person.words())
    for other in ATTRIBUTES:
        if other != last.attribute and _is_held_out("follow up", said, other) == held_out:
            turns += [_fact_turn(last.person, other, q) for q in ATTRIBUTES[other].follow_ups]
    for person in PEOPLE:
        if person is last.person or _is_held_out("and", said, person.name) != held_out:
            continue
        turns += [
            _fact_turn(person, last.attribute, q) for q in ("And {name}?", "What about {name}?")
        ]
    return turns


# Sums


_ADD = (
    "What is {a} + {b}?",
    "{a} + {b}",
    "{a} + {b} = ?",
    "{a}+{b}",
    "What is {a}+{b}?",
    "How much is {a} plus {b}?",
    "What is {a} plus {b}?",
    "Please add {a} and {b}.",
)
_SUBTRACT = (
    "What is {a} - {b}?",
    "{a} - {b}",
    "{a} - {b} = ?",
    "{a}-{b}",
    "What is {a}-{b}?",
    "How much is {a} minus {b}?",
    "What is {a} minus {b}?",
    "Please take {b} away from {a}.",
)


def sum_of(rng: random.Random, a: int, sign: str, b: int) -> Turn:
    value = a + b if sign == "+" else a - b
    question = rng.choice(_ADD if sign == "+" else _SUBTRACT).format(a=a, b=b)
    return Turn(question, f"{a} {sign} {b} = {value}.", f"{value}.", str(value))


def sums(held_out: bool) -> list[tuple[int, str, int]]:
    """Every (a, sign, b) with numbers and result in 0 .. LARGEST."""
    pairs = itertools.product(range(LARGEST + 1), repeat=2)
    sums = []
    for a, b in pairs:
        if a + b <= LARGEST and _is_held_out("+", min(a, b), max(a, b)) == held_out:
            sums.append((a, "+", b))
        if b <= a and _is_held_out("-", a, b) == held_out:
            sums.append((a, "-", b))
    return sums


# Stories


def stories(rng: random.Random, held_out: bool, **given: str) -> Iterator[Story]:
    """Stories without end; `given` fixes some of their words."""
    while True:
        story = make_story(rng, **given)
        if _is_held_out("story", story.text, one_in=16) == held_out:
            yield story


def reading(rng: random.Random, story: Story, asked: str, tell: bool) -> Turn:
    """A question about `story`; the story stands before the question if `tell`."""
    phrasings, reply, short, key = QUESTIONS[asked]
    words = story.words
    text = rng.choice(phrasings).format(**words)
    return Turn(
        f"{story.text}\n\n{text}" if tell else text,
        reply.format(**words),
        _sentence(short.format(**words)),
        key.format(**words),
    )


# Requests for a story

_REQUESTS = (
    "Tell me a story about {}.",
    "Can you tell me a story about {}?",
    "I would like a story about {}.",
)


def tale(rng: random.Random, held_out: bool) -> Turn:
    """A request for a story about something; the answer is what the story must mention."""
    if not held_out and rng.random() < 0.3:
        text = next(stories(rng, held_out)).text
        request = rng.choice(("Tell me a story.", "Can you tell me a story?"))
        return Turn(request, text, text, text)
    about, given = _subject(rng, held_out)
    text = next(stories(rng, held_out, **given)).text
    return Turn(rng.choice(_REQUESTS).format(about), text, text, ", ".join(given.values()))


def _subject(rng: random.Random, held_out: bool) -> tuple[str, dict[str, str]]:
    """What a story should be about, and the words that this fixes."""
    while True:
        animal, other = rng.sample(ANIMALS, 2)
        name, thing, colour = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(COLOURS)
        which = rng.randrange(5)
        if which == 0 and not held_out:
            return with_article(animal), {"animal": animal}
        if which == 1 and not held_out:
            return with_article(thing), {"thing": thing}
        if which == 2 and _is_held_out("tale", animal, other) == held_out:
            about = f"{with_article(animal)} and {with_article(other)}"
            return about, {"animal": animal, "other": other}
        if which == 3 and _is_held_out("tale", animal, name) == held_out:
            return f"{with_article(animal)} named {name}", {"animal": animal, "name": name}
        if which == 4 and _is_held_out("tale", colour, thing) == held_out:
            return with_article(f"{colour} {thing}"), {"colour": colour, "thing": thing}


# Things to look up in the prompt, and words to repeat

_LOOKUPS = (
    (
        "{name} has {a_thing}.",
        (
            ("What does {name} have?", "{name} has {a_thing}.", "{a_thing}", "{colour} {thing}"),
            ("Who has {a_thing}?", "{name} has {a_thing}.", "{name}", "{name}"),
            ("What colour is the {thing}?", "The {thing} is {colour}.", "{colour}", "{colour}"),
        ),
    ),
    (
        "{name} is {a_animal}.",
        (
            ("What is {name}?", "{name} is {a_animal}.", "{a_animal}", "{animal}"),
            ("Who is {a_animal}?", "{name} is {a_animal}.", "{name}", "{name}"),
        ),
    ),
    (
        "{name} likes {food}.",
        (
            ("What does {name} like?", "{name} likes {food}.", "{food}", "{food}"),
            ("Who likes {food}?", "{name} likes {food}.", "{name}", "{name}"),
        ),
    ),
    (
        "{name} feels {mood}.",
        (
            ("How does {name} feel?", "{name} feels {mood}.", "{mood}", "{mood}"),
            ("Who feels {mood}?", "{name} feels {mood}.", "{name}", "{name}"),
        ),
    ),
)  # fmt: skip


def lookups(rng: random.Random, held_out: bool) -> list[Turn]:
    """Three questions about a list of sentences; the first has the list in front."""
    while True:
        sentence, questions = rng.choice(_LOOKUPS)
        count = rng.randint(3, 6)
        lists = (NAMES, ANIMALS, OBJECTS, FOODS, MOODS)
        rows = [
            {"name": name, "animal": animal, "thing": thing, "food": food, "mood": mood}
            for name, animal, thing, food, mood in zip(
                *(rng.sample(words, count) for words in lists), strict=True
            )
        ]
        for row in rows:
            row["colour"] = rng.choice(COLOURS)
            row["a_animal"] = with_article(row["animal"])
            row["a_thing"] = with_article(f"{row['colour']} {row['thing']}")
        text = " ".join(sentence.format(**row) for row in rows)
        if _is_held_out("lookup", text) == held_out:
            break
    turns = []
    for i, row in enumerate(rng.sample(rows, 3)):
        question, reply, short, key = (part.format(**row) for part in rng.choice(questions))
        question = question if i else f"{text}\n\n{question}"
        turns.append(Turn(question, reply, _sentence(short), key))
    return turns


_REPEAT = ("Repeat: {}", "Please repeat: {}", "Say this: {}", "Please say: {}")
_WORDS = (*(p.name for p in PEOPLE), *NAMES, *ANIMALS, *OBJECTS, *COLOURS, *MOODS)
_SIGNS = tuple(p.emoji for p in PEOPLE)


def repeat(rng: random.Random, held_out: bool) -> Turn:
    """Words, numbers and emoji in any order, to be said again exactly."""
    while True:
        words = []
        for _ in range(rng.randint(2, 10)):
            kind = rng.randrange(10)
            number = str(rng.randrange(1000))
            words.append(number if kind == 0 else rng.choice(_SIGNS if kind == 1 else _WORDS))
        text = " ".join(words)
        if _is_held_out("repeat", text) == held_out:
            question = rng.choice(_REPEAT).format(text)
            return Turn(question, text, text, text, may_be_casual=False)

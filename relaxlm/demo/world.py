"""The closed little world that the demo model is trained on and tested with.

A toy made by this project, licensed Apache-2.0 with it: every sentence comes from the grammar in
this folder, none from anywhere else. There are facts about sixteen villagers, short stories with
questions about them, and addition and subtraction of numbers up to 99.

Training text and held-out questions never overlap. What is held out is decided by the content
alone, whatever the seed:

    fact, brief   for each fact one phrasing of the question (the other phrasings are trained)
    yes_no        one of eight (person, thing, colour) or (person, home) claims
    follow_up     one of eight (first reply, attribute or person asked about next) pairs
    reading       one of sixteen stories, with all its questions
    sum           one of eight pairs of numbers, in either order, in every phrasing
    tale          one of eight pairs of animals, or of animal and name, in a request for a story

Standard library only.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from relaxlm.demo.stories import ANIMALS, NAMES, OBJECTS, QUESTIONS, Story, make_story
from relaxlm.demo.talk import small_talk
from relaxlm.demo.village import (
    ATTRIBUTES,
    BY_NAME,
    COLOURS,
    PEOPLE,
    REVERSE,
    THINGS,
    Person,
    with_article,
)

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Conversation = list[Message]

KINDS = ("fact", "yes_no", "follow_up", "reading", "sum", "brief", "tale")
BRIEF = "Answer in as few words as possible."
SYSTEM_MESSAGES = (
    "You are a friendly assistant.",
    "You are a tiny demo model.",
    "You are a helpful assistant.",
)
LARGEST = 99


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a user's message.

    `answer` holds the phrases that a right reply contains, separated by ", " (see `grade`).
    """

    messages: tuple[Message, ...]
    answer: str
    kind: str

    @property
    def prompt(self) -> str:
        """The last user message."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class _Turn:
    """A question with its reply in a full sentence and in few words."""

    question: str
    reply: str
    short: str
    answer: str
    person: Person | None = None  # whom a follow-up may ask about
    attribute: str = ""

    def messages(self, brief: bool = False) -> list[Message]:
        return [_user(self.question), _assistant(self.short if brief else self.reply)]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _digest(*key: object) -> int:
    """The same on every machine and Python, unlike hash()."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def _is_held_out(*key: object, one_in: int = 8) -> bool:
    return _digest(*key) % one_in == 0


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


# Facts


def _fact_turn(person: Person, attribute: str, question: str) -> _Turn:
    a, words = ATTRIBUTES[attribute], person.words()
    return _Turn(
        question.format(**words),
        a.reply.format(**words),
        _sentence(a.short.format(**words)),
        a.key.format(**words),
        person,
        attribute,
    )


def _reverse_turn(person: Person, attribute: str, question: str) -> _Turn:
    turn = _fact_turn(person, REVERSE[attribute].attribute, question)
    return _Turn(turn.question, turn.reply, f"{person.name}.", person.name, person, turn.attribute)


def _held_out_phrasing(group: str, person: Person, attribute: str, phrasings: int) -> int:
    return _digest(group, person.name, attribute) % phrasings


def _fact_turns(held_out: bool) -> list[_Turn]:
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


def _claims(held_out: bool) -> list[_Turn]:
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
                word = "Yes" if true else "No"
                reply = ATTRIBUTES[attribute].reply.format(**words)
                turns.append(
                    _Turn(question, f"{word}, {reply}", f"{word}.", word, person, attribute)
                )
    return turns


def _follow_ups(person: Person, attribute: str, held_out: bool) -> list[_Turn]:
    """What can be asked after `attribute` of `person`: another attribute, or another person."""
    turns = []
    said = ATTRIBUTES[attribute].reply.format(**person.words())
    for other in ATTRIBUTES:
        if other != attribute and _is_held_out("follow up", said, other) == held_out:
            turns += [_fact_turn(person, other, q) for q in ATTRIBUTES[other].follow_ups]
    for other_person in PEOPLE:
        if other_person is person or _is_held_out("and", said, other_person.name) != held_out:
            continue
        turns += [
            _fact_turn(other_person, attribute, q) for q in ("And {name}?", "What about {name}?")
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


def _sum_turn(rng: random.Random, a: int, sign: str, b: int) -> _Turn:
    value = a + b if sign == "+" else a - b
    question = rng.choice(_ADD if sign == "+" else _SUBTRACT).format(a=a, b=b)
    return _Turn(question, f"{a} {sign} {b} = {value}.", f"{value}.", str(value))


def _sums(held_out: bool) -> list[tuple[int, str, int]]:
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


def stories(seed: int | str, held_out: bool = False) -> Iterator[Story]:
    """Stories without end; those of `held_out=True` are in no training text."""
    rng = random.Random(f"stories {seed}")
    while True:
        story = make_story(rng)
        if _is_held_out("story", story.text, one_in=16) == held_out:
            yield story


def _trained_story(rng: random.Random, **given: str) -> Story:
    while True:
        story = make_story(rng, **given)
        if not _is_held_out("story", story.text, one_in=16):
            return story


def _reading_turn(story: Story, asked: str, question: str, tell: bool) -> _Turn:
    """A question about `story`; the story stands before the question if `tell`."""
    _, reply, short, key = QUESTIONS[asked]
    words = story.words
    text = question.format(**words)
    return _Turn(
        f"{story.text}\n\n{text}" if tell else text,
        reply.format(**words),
        _sentence(short.format(**words)),
        key.format(**words),
    )


_REQUESTS = (
    "Tell me a story about {}.",
    "Can you tell me a story about {}?",
    "I would like a story about {}.",
)


def _tale(rng: random.Random, held_out: bool) -> tuple[str, dict[str, str]]:
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


# Training text


class _Trainer:
    """Draws what the model learns from; nothing held out is among it."""

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(f"conversations {seed}")
        self.facts = _fact_turns(held_out=False)
        claims = _claims(held_out=False)
        self.claims = [[c for c in claims if c.answer == word] for word in ("Yes", "No")]
        self.sums = _sums(held_out=False)

    def block(self) -> tuple[list[_Turn], bool]:
        """A few turns that belong together, and whether they may be asked for in few words."""
        rng = self.rng
        kind = rng.choices(("fact", "claim", "read", "sum", "tale", "talk"), (22, 12, 24, 28, 6, 8))
        if kind == ["fact"]:
            turns = [rng.choice(self.facts)]
            while rng.random() < 0.5:
                last = turns[-1]
                assert last.person
                turns.append(rng.choice(_follow_ups(last.person, last.attribute, held_out=False)))
            return turns, True
        if kind == ["claim"]:
            return [rng.choice(rng.choice(self.claims))], True
        if kind == ["read"]:
            story = _trained_story(rng)
            asked = rng.sample(list(QUESTIONS), rng.randint(3, 7))
            turns = [
                _reading_turn(story, which, rng.choice(QUESTIONS[which][0]), tell=i == 0)
                for i, which in enumerate(asked)
            ]
            return turns, True
        if kind == ["sum"]:
            return [_sum_turn(rng, *rng.choice(self.sums)) for _ in range(rng.randint(1, 5))], True
        if kind == ["tale"]:
            if rng.random() < 0.3:
                question = rng.choice(("Tell me a story.", "Can you tell me a story?"))
                given: dict[str, str] = {}
            else:
                about, given = _tale(rng, held_out=False)
                question = rng.choice(_REQUESTS).format(about)
            text = _trained_story(rng, **given).text
            return [_Turn(question, text, text, text)], False
        question, reply = small_talk(rng)
        return [_Turn(question, reply, reply, reply)], False


def _casual(question: str) -> str:
    """As typed in a hurry; a story before the question stays as it is."""
    story, gap, last = question.rpartition("\n\n")
    return story + gap + last.lower().rstrip("?.! ")


def _tokens(message: Message) -> int:
    """About how many tokens: words, digits and marks, and six for the frame."""
    return 6 + len(re.findall(r"\d|[^\W\d]+|[^\w\s]", message["content"]))


def training_conversations(seed: int | str, size: int = 280) -> Iterator[Conversation]:
    """Conversations without end, most of several turns, up to about `size` tokens each.

    Some begin with a system message; under `BRIEF` all replies are short.
    """
    trainer = _Trainer(seed)
    rng = trainer.rng
    while True:
        wanted = rng.randrange(size)
        system = rng.choices(("", BRIEF, rng.choice(SYSTEM_MESSAGES)), (60, 15, 25))[0]
        messages = [{"role": "system", "content": system}] if system else []
        used = 0
        while used < max(wanted, 1):
            turns, may_be_brief = trainer.block()
            if system == BRIEF and not may_be_brief:
                continue
            length = sum(_tokens(message) for turn in turns for message in turn.messages())
            if used and used + length > size:
                break
            for turn in turns:
                question, reply = turn.messages(brief=system == BRIEF)
                if rng.random() < 0.1:
                    question = _user(_casual(question["content"]))
                messages += [question, reply]
            used += length
        yield messages


def training_texts(seed: int | str) -> Iterator[str]:
    """Plain documents without end: stories, and lists of sums."""
    rng = random.Random(f"texts {seed}")
    sums = _sums(held_out=False)
    for story in stories(seed):
        yield story.text
        drill = [_sum_turn(rng, *rng.choice(sums)).reply for _ in range(rng.randint(4, 16))]
        yield "\n".join(drill)


# Held-out questions


def _ask(*messages: Message, answer: str, kind: str) -> Question:
    return Question(messages, answer, kind)


def held_out_questions() -> list[Question]:
    """About 900 questions that the training text asks only in other words or of other examples.

    Always the same, in an order in which every prefix has the kinds in about the proportions of
    the whole, so that `held_out_questions()[:60]` is a fair sample.
    """
    rng = random.Random("held out")
    facts = _fact_turns(held_out=True)
    rng.shuffle(facts)
    by_kind: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for turn in facts:
        by_kind["fact"].append(_ask(_user(turn.question), answer=turn.answer, kind="fact"))
    for turn in rng.sample(facts, 40):
        system = {"role": "system", "content": BRIEF}
        question = _ask(system, _user(turn.question), answer=turn.answer, kind="brief")
        by_kind["brief"].append(question)
    claims = _claims(held_out=True)
    no = rng.sample([c for c in claims if c.answer == "No"], 40)
    yes = [c for c in claims if c.answer == "Yes"]
    for turn in rng.sample(no + yes, len(no + yes)):
        by_kind["yes_no"].append(_ask(_user(turn.question), answer=turn.answer, kind="yes_no"))
    for first in rng.sample(_fact_turns(held_out=False), 110):
        assert first.person
        choices = _follow_ups(first.person, first.attribute, held_out=True)
        if not choices:
            continue
        then = rng.choice(choices)
        messages = [*first.messages(), _user(then.question)]
        by_kind["follow_up"].append(_ask(*messages, answer=then.answer, kind="follow_up"))
    for story in itertools.islice(stories("held out questions", held_out=True), 20):
        for which, (phrasings, *_) in QUESTIONS.items():
            turn = _reading_turn(story, which, rng.choice(phrasings), tell=True)
            question = _ask(_user(turn.question), answer=turn.answer, kind="reading")
            by_kind["reading"].append(question)
    for a, sign, b in rng.sample(_sums(held_out=True), 200):
        turn = _sum_turn(rng, a, sign, b)
        by_kind["sum"].append(_ask(_user(turn.question), answer=turn.answer, kind="sum"))
    for _ in range(40):
        about, given = _tale(rng, held_out=True)
        text = rng.choice(_REQUESTS).format(about)
        by_kind["tale"].append(_ask(_user(text), answer=", ".join(given.values()), kind="tale"))
    rng.shuffle(by_kind["reading"])
    placed = [
        ((i + 0.5) / len(questions), question)
        for questions in by_kind.values()
        for i, question in enumerate(questions)
    ]
    return [question for _, question in sorted(placed, key=lambda pair: pair[0])]


def in_long_chat(question: Question, size: int = 500) -> Question:
    """The same question at the end of a chat about other things, of about `size` tokens more."""
    system = [m for m in question.messages if m["role"] == "system"]
    chats = training_conversations(f"before {question.prompt}")
    before: list[Message] = []
    used = 0
    while used < size:
        chat = next(chats)
        if chat[0]["role"] != "system":
            before += chat
            used += sum(map(_tokens, chat))
    messages = (*system, *before, *question.messages[len(system) :])
    return Question(messages, question.answer, question.kind)


def held_out_texts() -> list[str]:
    """Thirty stories that are in no training text, for measuring a model's loss."""
    texts = stories("held out texts", held_out=True)
    return [story.text for story in itertools.islice(texts, 30)]


def grade(kind: str, reply: str, answer: str) -> bool:
    """Whether `reply` is right.

    A sum is right if the last number in the reply is the answer, a yes or no if it is the first
    word; otherwise each phrase of the answer (separated by ", ") must occur as whole words.

    Raises:
        ValueError: `kind` is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of question {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "sum":
        return re.findall(r"-?\d+", reply)[-1:] == [answer]
    if kind == "yes_no":
        return re.findall(r"\w+", reply)[:1] == [answer]
    return all(
        re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", reply, re.IGNORECASE)
        for phrase in answer.split(", ")
    )


__all__ = [
    "BRIEF",
    "BY_NAME",
    "KINDS",
    "Conversation",
    "Message",
    "Question",
    "Story",
    "grade",
    "held_out_questions",
    "held_out_texts",
    "in_long_chat",
    "stories",
    "training_conversations",
    "training_texts",
]

"""The closed little world that the demo model is trained on and tested with.

A toy made by this project, licensed Apache-2.0 with it: every sentence comes from the grammar in
this folder, none from anywhere else. There are facts about sixteen villagers, short stories with
questions about them, lists to look things up in, words to repeat, and addition and subtraction of
numbers up to 99.

Training text and held-out questions never overlap. What is held out is decided by the content
alone, whatever the seed:

    fact, brief   for each fact one phrasing of the question (the other phrasings are trained)
    yes_no        one of eight (person, thing, colour) or (person, home) claims
    follow_up     one of eight (first reply, attribute or person asked about next) pairs
    reading       one of sixteen stories, with all its questions
    sum           one of eight pairs of numbers, in either order, in every phrasing
    lookup        one of eight lists of sentences
    repeat        one of eight sequences of words
    tale          one of eight pairs of words that a story is asked to be about

Standard library only.
"""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from relaxlm.demo import turns
from relaxlm.demo.stories import QUESTIONS, Story
from relaxlm.demo.talk import small_talk
from relaxlm.demo.turns import Turn
from relaxlm.demo.village import BY_NAME

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Conversation = list[Message]

KINDS = ("fact", "yes_no", "follow_up", "reading", "lookup", "repeat", "sum", "brief", "tale")
BRIEF = "Answer in as few words as possible."
SYSTEM_MESSAGES = (
    "You are a friendly assistant.",
    "You are a tiny demo model.",
    "You are a helpful assistant.",
)


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a user's message.

    `answer` is what `grade` compares a reply with.
    """

    messages: tuple[Message, ...]
    answer: str
    kind: str

    @property
    def prompt(self) -> str:
        """The last user message."""
        return self.messages[-1]["content"]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _messages(turn: Turn, brief: bool = False) -> list[Message]:
    reply = turn.short if brief else turn.reply
    return [_user(turn.question), {"role": "assistant", "content": reply}]


# Training text


def stories(seed: int | str, held_out: bool = False) -> Iterator[Story]:
    """Stories without end; those of `held_out=True` are in no training text."""
    return turns.stories(random.Random(f"stories {seed}"), held_out)


class _Trainer:
    """Draws what the model learns from; nothing held out is among it."""

    SHARES: ClassVar[dict[str, int]] = {  # in percent of the blocks
        "fact": 18,
        "claim": 10,
        "reading": 22,
        "lookup": 10,
        "repeat": 8,
        "sum": 20,
        "tale": 6,
        "talk": 6,
    }

    NEVER_BRIEF = ("claim", "repeat", "tale", "talk")

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(f"conversations {seed}")
        self.facts = turns.facts(held_out=False)
        claims = turns.claims(held_out=False)
        self.claims = [[c for c in claims if c.answer == word] for word in ("yes", "no")]
        self.sums = turns.sums(held_out=False)

    def block(self, brief: bool) -> list[Turn]:
        """A few turns that belong together; if `brief`, such as have a brief reply."""
        rng, shares = self.rng, self.SHARES
        kinds = [kind for kind in shares if not (brief and kind in self.NEVER_BRIEF)]
        kind = rng.choices(kinds, [shares[kind] for kind in kinds])[0]
        if kind == "fact":
            block = [rng.choice(self.facts)]
            while rng.random() < 0.5:
                block.append(rng.choice(turns.follow_ups(block[-1], held_out=False)))
            return block
        if kind == "claim":
            return [rng.choice(rng.choice(self.claims))]
        if kind == "reading":
            story = next(turns.stories(rng, held_out=False))
            asked = rng.sample(list(QUESTIONS), rng.randint(3, 7))
            return [turns.reading(rng, story, which, tell=i == 0) for i, which in enumerate(asked)]
        if kind == "lookup":
            return turns.lookups(rng, held_out=False)
        if kind == "repeat":
            return [turns.repeat(rng, held_out=False) for _ in range(rng.randint(1, 3))]
        if kind == "sum":
            return [turns.sum_of(rng, *rng.choice(self.sums)) for _ in range(rng.randint(1, 5))]
        if kind == "tale":
            return [turns.tale(rng, held_out=False)]
        question, reply = small_talk(rng)
        return [Turn(question, reply, reply, reply)]


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
            block = trainer.block(brief=system == BRIEF)
            length = sum(_tokens(message) for turn in block for message in _messages(turn))
            if used and used + length > size:
                break
            for turn in block:
                question, reply = _messages(turn, brief=system == BRIEF)
                if turn.may_be_casual and rng.random() < 0.1:
                    question = _user(_casual(question["content"]))
                messages += [question, reply]
            used += length
        yield messages


def training_texts(seed: int | str) -> Iterator[str]:
    """Plain documents without end: stories, and lists of sums."""
    rng = random.Random(f"texts {seed}")
    sums = turns.sums(held_out=False)
    for story in stories(seed):
        yield story.text
        drill = [turns.sum_of(rng, *rng.choice(sums)).reply for _ in range(rng.randint(4, 12))]
        yield "\n".join(drill)


# Held-out questions


def held_out_questions() -> list[Question]:
    """About 1000 questions that the training text asks only in other words or of other examples.

    Always the same, in an order in which every prefix has the kinds in about the proportions of
    the whole, so that `held_out_questions()[:60]` is a fair sample.
    """
    rng = random.Random("held out")
    by_kind: dict[str, list[Question]] = {kind: [] for kind in KINDS}

    def ask(kind: str, turn: Turn, *before: Message) -> None:
        by_kind[kind].append(Question((*before, _user(turn.question)), turn.answer, kind))

    facts = turns.facts(held_out=True)
    rng.shuffle(facts)
    for turn in facts:
        ask("fact", turn)
    for turn in rng.sample(facts, 40):
        ask("brief", turn, {"role": "system", "content": BRIEF})
    claims = turns.claims(held_out=True)
    no = rng.sample([c for c in claims if c.answer == "no"], 40)
    yes = [c for c in claims if c.answer == "yes"]
    for turn in rng.sample(no + yes, len(no + yes)):
        ask("yes_no", turn)
    for first in rng.sample(turns.facts(held_out=False), 110):
        if choices := turns.follow_ups(first, held_out=True):
            ask("follow_up", rng.choice(choices), *_messages(first))
    some = list(itertools.islice(stories("held out questions", held_out=True), 20))
    for story, which in rng.sample(list(itertools.product(some, QUESTIONS)), 200):
        ask("reading", turns.reading(rng, story, which, tell=True))
    for a, sign, b in rng.sample(turns.sums(held_out=True), 200):
        ask("sum", turns.sum_of(rng, a, sign, b))
    for _ in range(60):
        ask("lookup", turns.lookups(rng, held_out=True)[0])
        ask("repeat", turns.repeat(rng, held_out=True))
    for _ in range(40):
        ask("tale", turns.tale(rng, held_out=True))
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

    A sum is right if the last number in the reply is the answer, a yes or no if it is the last
    word; words to repeat must come back exactly. Otherwise each phrase of the answer (separated
    by ", ") must occur as whole words.

    Raises:
        ValueError: `kind` is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of question {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "repeat":
        return reply.strip() == answer
    if kind == "sum":
        return re.findall(r"-?\d+", reply)[-1:] == [answer]
    if kind == "yes_no":
        return re.findall(r"\w+", reply)[-1:] == [answer]
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

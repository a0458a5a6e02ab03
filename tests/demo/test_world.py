import hashlib
import itertools
import re
from collections import Counter

import pytest

from relaxlm.demo import world
from relaxlm.demo.village import ATTRIBUTES, BY_NAME, PEOPLE, REVERSE


@pytest.fixture(scope="module")
def conversations() -> list[world.Conversation]:
    return list(itertools.islice(world.training_conversations(1), 4000))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(itertools.islice(world.training_texts(1), 1000))


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[world.Question]]:
    by_kind: dict[str, list[world.Question]] = {kind: [] for kind in world.KINDS}
    for question in world.held_out_questions():
        by_kind[question.kind].append(question)
    return by_kind


def said(conversations: list[world.Conversation], role: str) -> set[str]:
    return {m["content"] for chat in conversations for m in chat if m["role"] == role}


def plain(question: str) -> str:
    """Without case and closing marks: some training questions are typed in a hurry."""
    return question.lower().rstrip("?.! ")


def test_each_person_has_own_home_job_and_pet_name_and_a_mutual_friend() -> None:
    for attribute in ("name", "home", "job", "pet_name", "emoji"):
        assert len({getattr(person, attribute) for person in PEOPLE}) == len(PEOPLE)
    for person in PEOPLE:
        assert BY_NAME[BY_NAME[person.friend].friend] is person


def test_the_world_is_the_same_on_every_machine() -> None:
    text = repr(
        (
            world.held_out_questions(),
            world.held_out_texts(),
            list(itertools.islice(world.training_conversations(7), 50)),
            list(itertools.islice(world.training_texts(7), 50)),
        )
    )
    # The model was trained on this world: a change here needs `python tools/train_demo.py`.
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c505ae61d7ace657"


def test_another_seed_gives_other_conversations() -> None:
    first, second = (next(world.training_conversations(seed)) for seed in (1, 2))
    assert first != second


def test_conversations_alternate_and_start_with_an_optional_system_message(
    conversations: list[world.Conversation],
) -> None:
    with_system = 0
    for chat in conversations:
        roles = [m["role"] for m in chat]
        with_system += roles[0] == "system"
        roles = roles[roles[0] == "system" :]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    assert 0.3 < with_system / len(conversations) < 0.5
    assert sum(len(chat) > 4 for chat in conversations) > len(conversations) / 2


def test_brief_conversations_have_brief_replies(conversations: list[world.Conversation]) -> None:
    brief = [chat for chat in conversations if chat[0]["content"] == world.BRIEF]
    assert len(brief) > 300
    assert max(len(reply.split()) for reply in said(brief, "assistant")) <= 6


def test_there_is_text_outside_ascii(conversations: list[world.Conversation]) -> None:
    letters = Counter("".join(m["content"] for chat in conversations for m in chat))
    for character in "ëéêûÅ🙂🎉🐟":
        assert letters[character] > 5


def test_held_out_questions_have_all_kinds_and_any_prefix_is_a_fair_sample() -> None:
    questions = world.held_out_questions()
    whole = Counter(q.kind for q in questions)
    assert set(whole) == set(world.KINDS)
    assert len(questions) > 800 and min(whole.values()) >= 40
    start = Counter(q.kind for q in questions[:60])
    for kind, count in whole.items():
        assert abs(start[kind] - 60 * count / len(questions)) <= 1.5


def test_held_out_facts_are_taught_only_in_other_words(
    held_out: dict[str, list[world.Question]], conversations: list[world.Conversation]
) -> None:
    facts = held_out["fact"]
    assert len(facts) == len(PEOPLE) * (len(ATTRIBUTES) + len(REVERSE))
    asked = {plain(text) for text in said(conversations, "user")}
    replies = said(conversations, "assistant")
    for question in (*facts, *held_out["yes_no"], *held_out["brief"]):
        assert plain(question.prompt) not in asked
    for question in facts:
        names = {name for name in BY_NAME if name in question.prompt} or {question.answer}
        assert any(
            world.grade("fact", reply, question.answer) and any(name in reply for name in names)
            for reply in replies
        ), question


def test_held_out_follow_ups_are_not_trained_after_the_same_answer(
    held_out: dict[str, list[world.Question]], conversations: list[world.Conversation]
) -> None:
    trained = {
        (before["content"], plain(then["content"]))
        for chat in conversations
        for before, then in itertools.pairwise(chat)
        if before["role"] == "assistant"
    }
    assert len(trained) > 5000, len(trained)
    for question in held_out["follow_up"]:
        before, then = question.messages[-2:]
        assert (before["content"], plain(then["content"])) not in trained


def test_held_out_sums_are_trained_in_neither_order(
    held_out: dict[str, list[world.Question]],
    conversations: list[world.Conversation],
    texts: list[str],
) -> None:
    trained = set()
    for text in (*said(conversations, "assistant"), *texts):
        for a, sign, b, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", text):
            assert int(result) == int(a) + int(sign + b)
            trained |= {(a, sign, b)} | ({(b, sign, a)} if sign == "+" else set())
    assert len(trained) > 5000
    for question in held_out["sum"]:
        a, b = re.findall(r"\d+", question.prompt)
        if "away" in question.prompt:
            a, b = b, a
        minus = re.search(r"-|minus|away", question.prompt)
        assert (a, "-" if minus else "+", b) not in trained
        assert int(question.answer) == int(a) + int(b) * (-1 if minus else 1)


def test_held_out_stories_and_requests_are_not_trained(
    held_out: dict[str, list[world.Question]],
    conversations: list[world.Conversation],
    texts: list[str],
) -> None:
    asked = said(conversations, "user")
    everything = "\n".join((*asked, *said(conversations, "assistant"), *texts))
    stories = {q.prompt.split("\n\n")[0] for q in held_out["reading"]}
    assert len(stories) == 20
    for story in (*stories, *world.held_out_texts()):
        assert story not in everything
    for question in held_out["tale"]:
        assert question.prompt not in asked
        about = "story about" + plain(question.prompt.partition("story about")[2])
        assert not any(plain(request).endswith(about) for request in asked)


def test_every_held_out_story_question_can_be_answered_from_its_story(
    held_out: dict[str, list[world.Question]],
) -> None:
    for question in held_out["reading"]:
        story, _ = question.prompt.split("\n\n")
        assert world.grade("reading", story, question.answer)


def test_a_long_chat_keeps_system_message_question_and_answer(
    held_out: dict[str, list[world.Question]],
) -> None:
    for question in (held_out["brief"][0], held_out["follow_up"][0]):
        long = world.in_long_chat(question, size=300)
        assert world.in_long_chat(question, size=300) == long
        system = question.messages[0]["role"] == "system"
        assert long.messages[:system] == question.messages[:system]
        assert (
            long.messages[len(long.messages) - len(question.messages) + system :]
            == (question.messages[system:])
        )
        assert (long.answer, long.kind) == (question.answer, question.kind)
        roles = [m["role"] for m in long.messages[system:]]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert sum(len(m["content"].split()) for m in long.messages) > 100


@pytest.mark.parametrize(
    "kind, reply, answer, right",
    [
        ("fact", "Mia's boat is red.", "red", True),
        ("fact", "Mia's boat is bored.", "red", False),
        ("fact", "Zoë lives at the café.", "at the café", True),
        ("fact", "Red.", "red", True),
        ("fact", "Mia's favourite emoji is 🐟.", "🐟", True),
        ("fact", "Mia is 131 years old.", "31", False),
        ("fact", "", "red", False),
        ("tale", "Pip was a shy fox. He met an owl.", "fox, owl", True),
        ("tale", "Pip was a shy fox. He met a bear.", "fox, owl", False),
        ("yes_no", "Mia's boat is red, so no.", "no", True),
        ("yes_no", "Mia's boat is red, so yes.", "no", False),
        ("yes_no", "", "no", False),
        ("repeat", "red 🐟 Zoë\n", "red 🐟 Zoë", True),
        ("repeat", "red 🐟 Zoë 1", "red 🐟 Zoë", False),
        ("sum", "23 + 45 = 68.", "68", True),
        ("sum", "23 + 45 = 168.", "68", False),
        ("sum", "68 = 23 + 45.", "68", False),
        ("sum", "2 - 9 = -7.", "7", False),
        ("sum", "", "68", False),
    ],
)
def test_grade(kind: str, reply: str, answer: str, right: bool) -> None:
    assert world.grade(kind, reply, answer) is right


def test_grade_refuses_an_unknown_kind() -> None:
    with pytest.raises(ValueError) as error:
        world.grade("riddle", "", "")
    assert str(error.value) == (
        "unknown kind of question 'riddle', expected one of "
        "fact, yes_no, follow_up, reading, lookup, repeat, sum, brief, tale"
    )

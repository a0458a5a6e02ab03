"""Small talk of the demo model, and what it says when asked about the world outside its own."""

import random

from relaxlm.demo.village import PEOPLE, profile

_WHO = (
    "I am a tiny demo model made by the relaxlm project. I know a small made-up village, short "
    "stories and sums up to 99."
)
_CAN = (
    "I can tell you about the people of my village, tell a short story, answer questions about a "
    "story, and add or subtract numbers up to 99."
)
_PEOPLE = f"I know {', '.join(p.name for p in PEOPLE[:-1])} and {PEOPLE[-1].name}."
_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hello", "Hi!", "Hi", "Hi there!", "Hey!", "Good morning!", "Good evening!"),
        "Hello! 🙂 How can I help you?",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Are you a person?",
        ),
        _WHO,
    ),
    (("Who made you?", "Where do you come from?"), _WHO),
    (
        (
            "What can you do?",
            "What do you know?",
            "How can you help me?",
            "Help!",
            "What can I ask you?",
        ),
        _CAN,
    ),
    (
        ("Who do you know?", "Who lives in your village?", "Name the people of the village."),
        _PEOPLE,
    ),
    (("Thank you!", "Thanks!", "Thank you very much.", "Great, thanks!"), "You are welcome! 😊"),
    (("Goodbye!", "Bye!", "See you later!", "Good night!"), "Goodbye! 👋"),
    (("How are you?", "How are you today?"), "I am fine, thank you. 🙂 And you?"),
)
_UNKNOWN = "I do not know that. I am only a tiny demo model. 🙂"
_BEYOND = "I can only add and subtract numbers up to 99."
_TOPICS = (
    "France",
    "the moon",
    "music",
    "physics",
    "the sun",
    "dinosaurs",
    "computers",
    "football",
    "Japan",
    "the ocean",
    "history",
    "chess",
    "Mars",
    "volcanoes",
    "politics",
    "cars",
    "money",
    "space",
    "London",
    "robots",
    "science",
    "the weather",
    "planes",
    "Africa",
    "poetry",
    "the brain",
    "Python",
    "trains",
)
_OUTSIDE = (
    "What is the capital of {}?",
    "What do you know about {}?",
    "Tell me something about {}.",
    "Can you explain {}?",
    "Why is {} important?",
    "Who invented {}?",
    "Write a poem about {}.",
    "Write a program about {}.",
    "How does {} work?",
    "Where is {}?",
    "What is {}?",
    "How big is {}?",
    "What is the meaning of life?",
    "What time is it?",
    "Can you write code?",
    "What is the weather today?",
    "Do you like {}?",
    "Translate this into French.",
    "Tell me a joke.",
    "What is the best way to learn about {}?",
)


def small_talk(rng: random.Random) -> tuple[str, str]:
    """Draw a message and its reply."""
    which = rng.randrange(10)
    if which < 5:
        questions, reply = rng.choice(_TALK)
        question = rng.choice(questions)
    elif which == 5:
        name = rng.choice(PEOPLE).name
        question = rng.choice(("Hello, I am {}.", "Hi, my name is {}.")).format(name)
        reply = f"Hello, {name}! 🙂 How can I help you?"
    elif which == 6:
        person = rng.choice(PEOPLE)
        question = rng.choice(("Who is {}?", "Tell me about {}.", "What do you know about {}?"))
        question, reply = question.format(person.name), profile(person)
    elif which < 9:
        question, reply = rng.choice(_OUTSIDE).format(rng.choice(_TOPICS)), _UNKNOWN
    else:
        a, b = rng.randrange(100, 1000), rng.randrange(1, 1000)
        sign = rng.choice("+-*")
        question, reply = f"What is {a} {sign} {b}?", _BEYOND
    return question, reply

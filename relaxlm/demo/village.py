"""The fixed facts of the demo model's world: sixteen villagers, and the ways to ask about them.

Everything here is made up for relaxlm. A fact is a (person, attribute) pair; each attribute has
several phrasings of the question, one sentence that answers it, and a short form of the answer.
"""

from dataclasses import dataclass

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
THINGS = ("boat", "bike", "hat", "lamp")


@dataclass(frozen=True)
class Person:
    name: str
    she: str  # "she" or "he"
    age: int
    home: str  # with its preposition: "in the lighthouse"
    job: str
    food: str
    pet: str
    pet_name: str
    friend: str
    emoji: str
    boat: str  # the colour of each thing
    bike: str
    hat: str
    lamp: str

    def words(self) -> dict[str, str]:
        """What a template may name in braces."""
        her = "her" if self.she == "she" else "his"
        fields = {key: str(value) for key, value in vars(self).items()}
        return fields | {
            "her": her,
            "She": self.she.capitalize(),
            "a_job": with_article(self.job),
            "a_pet": with_article(self.pet),
        }


@dataclass(frozen=True)
class Attribute:
    """One thing to know about a person.

    `questions` name the person; `follow_ups` use a pronoun, for a person named in the turn before.
    `key` is what a right answer contains; `short` is the whole answer when few words are wanted.
    """

    questions: tuple[str, ...]
    follow_ups: tuple[str, ...]
    reply: str
    short: str
    key: str


@dataclass(frozen=True)
class Reverse:
    """A question whose answer is the person; the value it names belongs to that person only."""

    questions: tuple[str, ...]
    attribute: str  # whose sentence is the reply


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _person(name: str, she: str, age: str, *others: str) -> Person:
    return Person(name, she, int(age), *others[:-1], *others[-1].split())


# Name, pronoun, age, home, job, food, pet and its name, best friend, emoji; boat, bike, hat, lamp.
_PEOPLE = """
Mia, she, 31, in the lighthouse, sailor, soup, dog, Biscuit, Tom, 🐟, red blue white green
Tom, he, 45, in the old mill, baker, bread, cat, Pepper, Mia, 🍞, yellow red black blue
Zoë, she, 27, at the café, cook, crêpes, parrot, Noodle, Ben, 🙂, green purple red white
Ben, he, 52, on the farm, farmer, corn, pony, Clover, Zoë, 🌻, blue green yellow red
Ana, she, 38, in the tower, astronomer, pasta, owl, Luna, Leo, 🌙, white black blue purple
Leo, he, 23, in the tent, juggler, pancakes, monkey, Ziggy, Ana, 🎈, purple orange green yellow
Ida, she, 64, in the cottage, gardener, salad, rabbit, Button, Max, 🌷, orange white purple black
Max, he, 19, in the barn, painter, pizza, goat, Pixel, Ida, 🎨, black yellow orange blue
Eva, she, 41, at the school, teacher, rice, hamster, Peanut, Finn, 📚, red green black orange
Finn, he, 36, on the houseboat, fisher, fish, turtle, Olive, Eva, 🌊, blue white red yellow
Lea, she, 29, in the castle, singer, cake, pony, Maple, Sam, 🎵, yellow purple white red
Sam, he, 58, at the station, driver, beans, dog, Waffle, Lea, 🚂, green blue orange purple
Chloé, she, 33, by the harbour, doctor, apples, cat, Mochi, Otto, 🌈, white orange blue green
Otto, he, 70, in the workshop, smith, cheese, parrot, Domino, Chloé, ⏰, purple black green white
Noé, he, 25, in the treehouse, carpenter, nuts, rabbit, Tofu, Ruth, 🌲, orange red yellow black
Ruth, she, 47, by the river, potter, crème brûlée, duck, Soufflé, Noé, 🏺, black green purple orange
"""
PEOPLE = tuple(_person(*line.split(", ")) for line in _PEOPLE.strip().splitlines())
BY_NAME = {person.name: person for person in PEOPLE}


def _thing(thing: str) -> Attribute:
    return Attribute(
        questions=(
            f"What colour is {{name}}'s {thing}?",
            f"What color is {{name}}'s {thing}?",
            f"What is the colour of {{name}}'s {thing}?",
            f"Which colour does {{name}}'s {thing} have?",
            f"Tell me the colour of {{name}}'s {thing}.",
            f"Do you know the colour of {{name}}'s {thing}?",
        ),
        follow_ups=(f"What colour is {{her}} {thing}?", f"And {{her}} {thing}?"),
        reply=f"{{name}}'s {thing} is {{{thing}}}.",
        short=f"{{{thing}}}",
        key=f"{{{thing}}}",
    )


ATTRIBUTES: dict[str, Attribute] = {
    "age": Attribute(
        (
            "How old is {name}?",
            "What is {name}'s age?",
            "What age is {name}?",
            "Tell me how old {name} is.",
            "Do you know how old {name} is?",
        ),
        ("How old is {she}?", "And what is {her} age?"),
        "{name} is {age} years old.",
        "{age}",
        "{age}",
    ),
    "home": Attribute(
        (
            "Where does {name} live?",
            "Where is {name}'s home?",
            "Where can I find {name}?",
            "Tell me where {name} lives.",
            "Do you know where {name} lives?",
        ),
        ("Where does {she} live?", "And where is {her} home?"),
        "{name} lives {home}.",
        "{home}",
        "{home}",
    ),
    "job": Attribute(
        (
            "What is {name}'s job?",
            "What does {name} do for a living?",
            "What work does {name} do?",
            "Tell me about {name}'s job.",
            "Do you know {name}'s job?",
        ),
        ("What is {her} job?", "And what work does {she} do?"),
        "{name} is {a_job}.",
        "{a_job}",
        "{job}",
    ),
    "food": Attribute(
        (
            "What is {name}'s favourite food?",
            "What does {name} like to eat?",
            "What food does {name} like best?",
            "Tell me {name}'s favourite food.",
            "Do you know what {name} likes to eat?",
        ),
        ("What is {her} favourite food?", "And what does {she} like to eat?"),
        "{name}'s favourite food is {food}.",
        "{food}",
        "{food}",
    ),
    "pet": Attribute(
        (
            "What pet does {name} have?",
            "Which animal does {name} have?",
            "What kind of pet does {name} own?",
            "Tell me what pet {name} has.",
            "Do you know what pet {name} has?",
        ),
        ("What pet does {she} have?", "And which animal does {she} have?"),
        "{name} has {a_pet} named {pet_name}.",
        "{a_pet}",
        "{pet}",
    ),
    "pet_name": Attribute(
        (
            "What is the name of {name}'s {pet}?",
            "What is {name}'s {pet} called?",
            "How is {name}'s {pet} named?",
            "Tell me the name of {name}'s {pet}.",
            "Do you know the name of {name}'s {pet}?",
        ),
        ("What is {her} {pet} called?", "And the name of {her} {pet}?"),
        "{name} has {a_pet} named {pet_name}.",
        "{pet_name}",
        "{pet_name}",
    ),
    "friend": Attribute(
        (
            "Who is {name}'s best friend?",
            "Who is the best friend of {name}?",
            "Which person does {name} like best?",
            "Tell me who {name}'s best friend is.",
            "Do you know {name}'s best friend?",
        ),
        ("Who is {her} best friend?", "And {her} best friend?"),
        "{name}'s best friend is {friend}.",
        "{friend}",
        "{friend}",
    ),
    "emoji": Attribute(
        (
            "What is {name}'s favourite emoji?",
            "Which emoji does {name} like?",
            "What emoji does {name} use most?",
            "Show me {name}'s favourite emoji.",
            "Do you know {name}'s favourite emoji?",
        ),
        ("What is {her} favourite emoji?", "And which emoji does {she} like?"),
        "{name}'s favourite emoji is {emoji}.",
        "{emoji}",
        "{emoji}",
    ),
    **{thing: _thing(thing) for thing in THINGS},
}

REVERSE: dict[str, Reverse] = {
    "home": Reverse(
        (
            "Who lives {home}?",
            "Which person lives {home}?",
            "Tell me who lives {home}.",
            "Do you know who lives {home}?",
        ),
        "home",
    ),
    "job": Reverse(
        (
            "Who is the {job}?",
            "Who works as {a_job}?",
            "Tell me who the {job} is.",
            "Do you know the {job}'s name?",
        ),
        "job",
    ),
    "pet_name": Reverse(
        (
            "Who owns {pet_name}?",
            "Whose {pet} is {pet_name}?",
            "Tell me who owns {pet_name}.",
            "Who has a pet named {pet_name}?",
        ),
        "pet_name",
    ),
}


def profile(person: Person) -> str:
    """A few sentences about one person."""
    return (
        "{name} is {a_job}. {She} is {age} years old and lives {home}. "
        "{She} has {a_pet} named {pet_name}, and {her} best friend is {friend}."
    ).format(**person.words())

"""The words of brief_task.py: questions with one right answer, and what a rambler adds to it.

A kind of question has forms to ask it, a sentence that answers it, and (what is asked about, answer) pairs.
"""

from typing import NamedTuple


class Kind(NamedTuple):
    questions: tuple[str, ...]
    sentence: str
    facts: tuple[tuple[str, str], ...]


def _facts(text: str) -> tuple[tuple[str, str], ...]:
    pairs = (pair.split(":") for pair in text.split(","))
    return tuple((asked.strip(), answer.strip()) for asked, answer in pairs)


TRAIN_KINDS = {
    "capital": Kind(
        ("What is the capital of {x}?", "Which city is the capital of {x}?", "Name the capital of {x}."),
        "The capital of {x} is {y}.",
        _facts(
            "France: Paris, Italy: Rome, Spain: Madrid, Germany: Berlin, Japan: Tokyo, China: Beijing, Russia: Moscow, "
            "Egypt: Cairo, Greece: Athens, Poland: Warsaw, Austria: Vienna, Portugal: Lisbon, Ireland: Dublin, "
            "Norway: Oslo, Sweden: Stockholm, Finland: Helsinki, Denmark: Copenhagen, Hungary: Budapest, Cuba: Havana, "
            "Peru: Lima, Chile: Santiago, Canada: Ottawa, Vietnam: Hanoi, Thailand: Bangkok, Kenya: Nairobi, "
            "Turkey: Ankara, Iraq: Baghdad, Iran: Tehran, Belgium: Brussels, Romania: Bucharest"
        ),
    ),
    "opposite": Kind(
        ("What is the opposite of {x}?", "Which word means the opposite of {x}?", 'Give the opposite of "{x}".'),
        'The opposite of "{x}" is "{y}".',
        _facts(
            "hot: cold, big: small, fast: slow, up: down, light: dark, old: young, rich: poor, wet: dry, hard: soft, "
            "early: late, happy: sad, full: empty, open: closed, high: low, strong: weak, thick: thin, good: bad, "
            "left: right, day: night, black: white, clean: dirty, near: far, long: short, loud: quiet, deep: shallow, "
            "true: false, wide: narrow, sweet: bitter, first: last, tall: short"
        ),
    ),
    "plural": Kind(
        ("What is the plural of {x}?", 'How do you write "{x}" in the plural?', "Give the plural form of {x}."),
        'The plural of "{x}" is "{y}".',
        _facts(
            "cat: cats, box: boxes, child: children, mouse: mice, foot: feet, tooth: teeth, man: men, leaf: leaves, "
            "city: cities, bus: buses, wolf: wolves, baby: babies, dish: dishes, knife: knives, goose: geese, "
            "dog: dogs, house: houses, church: churches, story: stories, tree: trees, woman: women, shelf: shelves, "
            "fox: foxes, party: parties, book: books, glass: glasses, life: lives, country: countries, table: tables"
        ),
    ),
    "color": Kind(
        ("What color is {x}?", "Which color does {x} have?", "Name the color of {x}."),
        "The color of {x} is {y}.",
        _facts(
            "grass: green, snow: white, coal: black, blood: red, the sky: blue, a banana: yellow, an orange: orange, "
            "milk: white, a ripe tomato: red, the sun: yellow, chocolate: brown, a raven: black, a lemon: yellow, "
            "a carrot: orange, a frog: green, a polar bear: white, a strawberry: red, spinach: green, "
            "a flamingo: pink, an elephant: gray, salt: white, a cucumber: green, a pumpkin: orange, a swan: white, "
            "a cherry: red, ink: black, a canary: yellow, the ocean: blue, soil: brown, an eggplant: purple"
        ),
    ),
    "sum": Kind(
        ("What is {x}?", "How much is {x}?", "Compute {x}."),
        "{x} is equal to {y}.",
        tuple((f"{a} + {b}", str(a + b)) for a, b in zip(range(1, 31), [*range(2, 11)] * 4, strict=False)),
    ),
}
UNSEEN_KINDS = {
    "language": Kind(
        ("Which language do most people in {x} speak?", "What is the language of {x}?"),
        "In {x}, most people speak {y}.",
        _facts(
            "France: French, Italy: Italian, Spain: Spanish, Germany: German, Japan: Japanese, China: Chinese, "
            "Russia: Russian, Greece: Greek, Poland: Polish, Portugal: Portuguese, Norway: Norwegian, Sweden: Swedish, "
            "Mexico: Spanish, Brazil: Portuguese, Austria: German, Turkey: Turkish, Hungary: Hungarian, Thailand: Thai"
        ),
    ),
    "past": Kind(
        ('What is the past tense of "{x}"?', 'Put the verb "{x}" in the past tense.'),
        'The past tense of "{x}" is "{y}".',
        _facts(
            "go: went, see: saw, take: took, give: gave, come: came, run: ran, eat: ate, write: wrote, find: found, "
            "know: knew, think: thought, buy: bought, sing: sang, drink: drank, speak: spoke, sleep: slept, "
            "walk: walked, play: played"
        ),
    ),
    "next": Kind(
        ("Which day comes after {x}?", "If today is {x}, what day is tomorrow?"),
        "The day that comes after {x} is {y}.",
        _facts(
            "Monday: Tuesday, Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, Friday: Saturday, "
            "Saturday: Sunday, Sunday: Monday"
        ),
    ),
}

FILLERS = {
    "train": (
        "That is a great question, and I am happy to help you with it.",
        "It is something that many people learn at school and like to remember.",
        "If you would like to know more about this topic, feel free to ask me.",
        "This is an interesting fact with a long and fascinating history behind it.",
        "There are of course many other things that could be said about it.",
        "I hope that this answer is helpful and that it is clear to you.",
        "It is always good to be curious and to ask questions like this one.",
        "Please let me know whether there is anything else that I can do for you.",
    ),
    "held out": (
        "Many thanks for asking, since this is a topic that comes up quite often.",
        "You may also want to look it up in a good encyclopedia or on the internet.",
        "As you can see, the answer is simple once one has thought about it for a while.",
        "Do not hesitate to come back whenever another question is on your mind.",
    ),
}

"""The demo's task: a customer's message becomes a record that a shop's order system can read.

    input    Hi, this is Chloé Lambert. Could you send three oak stools to Leeds on Friday at 3 pm?
    output   {"name": "Chloé Lambert", "item": "oak stools", "quantity": 3, "place": "Leeds", "day": "Friday", "time": "15:00"}

Rows come from sentence forms and word lists, so every answer is known to be right. Names, items, places and days are
copied from the text; number words become numbers, times become 24-hour times, and what is not said is null.

    train        known words in known forms
    recombined   the same words and forms in rows that training never shows: a checksum of the text decides the side
    unseen       names, materials, things, places and sentence forms that are nowhere in training

A row is a pure function of (split, seed, its number). Rows have the Alpaca shape {instruction, input, output}.
Left out: spelling mistakes, several items in one message, other languages than English around the words.
"""

import json
import random
import zlib
from collections.abc import Sequence

KEYS = ("name", "item", "quantity", "place", "day", "time")
SPLITS = ("train", "recombined", "unseen")
INSTRUCTION = "Order to JSON: " + ", ".join(KEYS) + "."

# {on} is a day with its preposition ("on Friday", "tomorrow"), {day} the day alone. {some} and {bare} leave the
# quantity out; {items} follows a quantity, and is singular after "a".
FORMS = {
    "train": (
        "Hi, this is {name}. Could you send {items} to {place} {on} at {time}?",
        "{name} here. I'd like {items} delivered to {place} by {day}, please.",
        "Please deliver {items} to {name} in {place} {on} at {time}.",
        "Order from {name}: {items}. Deliver to {place} {on}.",
        "Can I get {items}? Ship to {place}. My name is {name}.",
        "We need {items} in {place} {on}, before {time}.",
        "Hello! {items} for {name}, please. Drop off in {place} at {time} {on}.",
        "Good morning, I am {name} and I want to order {items}. I live in {place}.",
        "{items} to {place}, {day}, {time}. Thanks, {name}",
        "Send {items} to {place}. It's for {name}.",
        "Could you bring {items} to my shop in {place} at {time}? I'm there {on}. {name}",
        "I'd like to buy {items}. Delivery {on}, please. Regards, {name}",
        "This is {name} from {place}. Do you have {items} for {day}?",
        "My order: {items}. Address: {place}. Time: {time}. Name: {name}.",
        "For {day}: {items}, to {place}. Ask for {name}.",
        "{name} wants {items}, delivered to {place} at {time}.",
        "Please put {items} aside for {name}. I'll pick up {on} at {time}.",
        "Hey, it's {name} again. Same as last time: {items}, {place}, {day}.",
        "Is it possible to get {items} to {place} by {time} {on}?",
        "I would like {items}. The name is {name} and we are in {place}. Can you come {on}?",
        "Hello, {items} please. {on_start} at {time} would be best. {name}, {place}",
        "We are in {place} and we ran out of {bare}. Could you come {on}? {name}",
        "New order, {items}, customer {name}, delivery to {place}, {day} at {time}.",
        "Dear team, kindly send {items} to our office in {place}. Best wishes, {name}",
        "{on_start} I need {items} in {place}. Please call when you leave. {name}",
        "Do you still sell {bare}? I'm {name}, from {place}. I could come {on} at {time}.",
        "Hi! My name is {name}. {items} please, I'll collect them {on}.",
        "Bring {items} to {place} at {time}, and tell {name} when you are there.",
        "{name} called. {items} for {place}, needed by {day}.",
        "I ordered {items} but changed my mind about the day: make it {day}, {time}. {name}",
        "Please send {some} to {place} {on}. Thank you! {name}",
        "Thanks for the call. I'll take {items}. Deliver at {time} to {place}. {name}",
        "Would {day} at {time} work? I need {items} in {place}.",
        "To: {place}. What: {items}. When: {day}. Who: {name}.",
        "It's {name}. A courier will fetch {items} {on} at {time}.",
        "{items}, please! {name}, {place}. No rush.",
    ),
    "unseen": (
        "Good evening, {name} speaking. I want {items} brought to {place} {on}, around {time}.",
        "Reserve {items} for me, please. I'll be in {place} {on}. Yours, {name}",
        "Quick one from {name}: {items}, drop at {place}, {time}.",
        "Our café in {place} needs {items} {on}. Contact: {name}.",
        "May I have {items} sent over to {place}? {on_start} is fine. Cheers, {name}",
        "I'm writing for {name}, who would love {items}. Deliver {on} at {time}, please.",
        "Purchase request: {items}. Destination: {place}. Date: {day}. Hour: {time}. Buyer: {name}.",
        "Hi there, can {items} reach {place} by {day}? If so, book it under {name}.",
        "{name} would like to know if you could drop {items} at {place} at {time}.",
        "Looking for {some} near {place}. Could someone call me {on}? {name}",
        "At {time} {on}, please have {items} ready. Signed, {name}",
        "We just moved to {place}, so send {items} there {on}, not to the old flat. {name}",
    ),
}

FIRST_NAMES = {
    "train": "Anna Ben Chloé Daniel Elif Farid Grace Hugo Ines Jonas Karim Lena Marco Nadia Oscar Paula Quentin Rosa Samir "
    "Tara Umar Vera Wendy Yusuf Zoë André Beatriz Carlos Dörte Emeka François Greta Håkon Irina José Katya Luca Maja "
    "Noémie Olivia Pedro Renée Søren Tomás Ursula Viktor Aisha Bruno Clara Dimitri".split(),
    "unseen": "Mathilde Rafael Ingrid Kwame Léa Stefan Priya Owen Björn Valentina Hassan Aurélie Tobias Naomi Gábor Fiona".split(),
}
LAST_NAMES = {
    "train": "Lambert Novak Schmidt Okafor Rossi García Larsen Dubois Patel Müller Costa Ivanova Kaya Brown Nilsson Fischer "
    "Silva Murphy Haddad Kowalski Jensen Moreau Weber Santos Petrov Demir Taylor Lindgren Ferrari Gonçalves Ahmed Walker "
    "Bakker Núñez Popescu Clarke Öztürk Vogel Reyes Hansen Martin Sokolov Ricci Cooper Bergström Chan Fontaine Mbeki".split(),
    "unseen": "Whitfield Lefèvre Adeyemi Horváth Castellano Bauer Sandoval Eriksen Thackeray Yılmaz Delacroix Pereira "
    "Kobayashi Strand Gallagher Zieliński".split(),
}
WHOLE_NAMES = {
    "train": ("Nguyễn Thị Lan", "Trần Văn Minh", "Lê Hoàng Nam", "Phạm Thu Hà", "Võ Minh Tuấn", "Đặng Ngọc Mai", "Bùi Thanh Sơn",
              "Hồ Bảo Trân", "Ngô Đức Anh", "Dương Mỹ Linh"),
    "unseen": ("Huỳnh Quốc Việt", "Đỗ Khánh Vy", "Lý Gia Hân", "Phan Hữu Phước", "Vũ Tường Vi"),
}
MATERIALS = {
    "train": "oak pine steel glass linen cotton leather ceramic brass paper wool bamboo copper marble plastic rubber silk "
    "walnut red blue green white black yellow large small round folding".split(),
    "unseen": "cherry velvet iron purple granite striped wicker silver hemp narrow".split(),
}
THINGS = {
    "train": "stool chair table lamp vase mug bowl plate basket curtain blanket pillow rug shelf mirror clock frame candle "
    "bottle jar tray bag box apron towel spoon teapot bench desk cabinet".split(),
    "unseen": "kettle ladder drawer hammock saucer bucket wardrobe notebook lantern planter".split(),
}
PLACES = {
    "train": ("Leeds", "Porto", "Hanoi", "Berlin", "Lyon", "Kraków", "Malmö", "Zürich", "Đà Nẵng", "São Paulo", "Dublin", "Madrid",
              "Lagos", "Austin", "Geneva", "Oslo", "Bergen", "Naples", "Prague", "Cardiff", "Boston", "Málaga", "Ghent", "Köln",
              "Huế", "Nairobi", "Utrecht", "Seattle", "Turin", "Athens", "12 Rose Street", "7 Mill Lane", "48 Station Road",
              "3 Harbour View", "91 King Street", "25 Garden Row", "160 Park Avenue", "5 Church Hill"),
    "unseen": ("Bristol", "Vilnius", "Cần Thơ", "Montréal", "Denver", "Aarhus", "Sevilla", "Mombasa", "Graz", "Plovdiv", "Nha Trang",
               "Toulouse", "64 Willow Close", "19 Castle Road", "230 Ocean Drive", "8 Abbey Gardens"),
}
MONTHS = {
    "train": ("January", "March", "April", "May", "June", "July", "September", "October", "November", "December"),
    "unseen": ("February", "August"),
}
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBER_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12}


def make_split(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` different rows {instruction, input, output}; the first k rows do not depend on n.

    Raises ValueError when the split is not train, recombined or unseen.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    words = "unseen" if split == "unseen" else "train"
    rng = random.Random(f"{split} {seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        text, record = _draw(rng, words)
        if split == "unseen" or _side(text) == split:
            rows[text] = {"instruction": INSTRUCTION, "input": text, "output": json.dumps(record, ensure_ascii=False)}
    return list(rows.values())


def _side(text: str) -> str:
    """Every text belongs to one side for ever, so that no seed or size lets a training row into the held-out ones."""
    return "recombined" if zlib.crc32(text.encode()) % 5 == 0 else "train"


def _draw(rng: random.Random, words: str) -> tuple[str, dict[str, str | int | None]]:
    """One message and its record."""
    form = _pick(rng, FORMS[words])
    quantity, items = _items(rng, words)
    day, on = _day(rng, words)
    time_said, time = _time(rng)
    said = {"name": _name(rng, words), "place": _pick(rng, PLACES[words]), "day": day, "time": time_said}
    plural = _plural(f"{_pick(rng, MATERIALS[words])} {_pick(rng, THINGS[words])}")
    text = form.format(
        **said, items=f"{quantity[0]} {items}", some=f"some {plural}", bare=plural, on=on, on_start=on[0].upper() + on[1:]
    )
    text = text[0].upper() + text[1:]
    has = {key: "{" + key + "}" in form for key in ("name", "place", "time", "items")}
    record: dict[str, str | int | None] = {
        "name": said["name"] if has["name"] else None,
        "item": items if has["items"] else plural,
        "quantity": quantity[1] if has["items"] else None,
        "place": said["place"] if has["place"] else None,
        "day": day if any(slot in form for slot in ("{day}", "{on}", "{on_start}")) else None,
        "time": time if has["time"] else None,
    }
    return text, record


def _pick(rng: random.Random, choices: Sequence[str]) -> str:
    """Only random() is promised to give the same numbers in every Python; choice() is not."""
    return choices[int(rng.random() * len(choices))]


def _name(rng: random.Random, words: str) -> str:
    if rng.random() < 0.2:
        return _pick(rng, WHOLE_NAMES[words])
    return f"{_pick(rng, FIRST_NAMES[words])} {_pick(rng, LAST_NAMES[words])}"


def _items(rng: random.Random, words: str) -> tuple[tuple[str, int], str]:
    """(how the quantity is said, its number), and the thing in the number that goes with it."""
    thing = f"{_pick(rng, MATERIALS[words])} {_pick(rng, THINGS[words])}"
    kind = rng.random()
    if kind < 0.2:
        return ("an" if thing[0] in "aeiou" else "a", 1), thing
    if kind < 0.6:
        word = _pick(rng, list(NUMBER_WORDS))
        return (word, NUMBER_WORDS[word]), _plural(thing)
    number = 2 + int(rng.random() * 98)
    return (str(number), number), _plural(thing)


def _plural(thing: str) -> str:
    if thing.endswith("shelf"):
        return thing[:-1] + "ves"
    return thing + ("es" if thing.endswith(("x", "ch", "sh", "s")) else "s")


def _day(rng: random.Random, words: str) -> tuple[str, str]:
    """(the day, the day with its preposition)."""
    kind = rng.random()
    if kind < 0.15:
        return "tomorrow", "tomorrow"
    if kind < 0.65:
        day = _pick(rng, WEEKDAYS)
    else:
        day = f"{1 + int(rng.random() * 28)} {_pick(rng, MONTHS[words])}"
    return day, f"on {day}"


def _time(rng: random.Random) -> tuple[str, str]:
    """(how the time is said, the time in 24 hours)."""
    kind = rng.random()
    if kind < 0.1:
        return "noon", "12:00"
    if kind < 0.5:
        hour = 7 + int(rng.random() * 13)
        half = "am" if hour < 12 else "pm"
        return f"{(hour - 1) % 12 + 1} {half}", f"{hour:02d}:00"
    said = f"{10 + int(rng.random() * 10)}:{5 * int(rng.random() * 12):02d}"
    return said, said


def score(outputs: Sequence[str], rows: Sequence[dict[str, str]]) -> list[bool]:
    """Whether each output is JSON equal to the row's: the same keys, values and types. The order of keys is free."""
    return [_canonical(output) == _canonical(row["output"]) for output, row in zip(outputs, rows, strict=True)]


def field_scores(outputs: Sequence[str], rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """For each key, the share of outputs whose value is right: it shows what a wrong record got wrong."""
    right = dict.fromkeys(KEYS, 0)
    for output, row in zip(outputs, rows, strict=True):
        found, wanted = _parse(output), json.loads(row["output"])
        for key in KEYS:
            right[key] += isinstance(found, dict) and key in found and json.dumps(found[key]) == json.dumps(wanted[key])
    return {key: count / max(len(rows), 1) for key, count in right.items()}


def _canonical(output: str) -> str | None:
    """One spelling per value, so that 3, 3.0, "3" and true differ; None when it is no JSON object."""
    parsed = _parse(output)
    return json.dumps(parsed, sort_keys=True) if isinstance(parsed, dict) else None


def _parse(output: str) -> object:
    try:
        return json.loads(output)
    except (ValueError, RecursionError):
        return None

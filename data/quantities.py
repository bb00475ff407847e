"""A task for rewards: read a number out of a sentence. A small model can do it sometimes; a rule can judge it.

    question   I bought 38 lemons and 10 chairs. How many chairs did I buy?
    answer     10

Half of the questions name one thing, half two. Numbers lie between 2 and 59.

    train      things and verbs that training shows
    dev        other things and other verbs, to choose settings by; the form of the sentences is the same
    unseen     others again, for the figure that is reported

Half of the questions have one number, so that always giving the first is right three times in four, and so is always
giving the last: 75 % shows no understanding. The reward `number`, which takes the last number of an answer, is content
with an answer that repeats both; `regex:\\D*\\d+\\D*` beside it wants one number and no other.

A row {prompt, completion} is a pure function of (split, seed, its number); the completion is the right number alone.
"""

import random

SPLITS = ("train", "dev", "unseen")
THINGS = {
    "train": [
        "apples",
        "rivers",
        "chairs",
        "gardens",
        "windows",
        "doctors",
        "markets",
        "pencils",
        "bridges",
        "tigers",
        "castles",
        "lemons",
    ],
    "dev": ["bottles", "kittens", "ladders", "islands", "buttons", "tables", "planets", "spoons"],
    "unseen": ["boxes", "horses", "letters", "mountains", "shirts", "engines", "flowers", "coins"],
}
VERBS = {
    "train": (("bought", "buy"), ("saw", "see"), ("counted", "count"), ("drew", "draw")),
    "dev": (("took", "take"), ("made", "make"), ("lost", "lose")),
    "unseen": (("sold", "sell"), ("found", "find"), ("painted", "paint")),
}
SMALLEST, LARGEST = 2, 59


def make_quantities(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` different rows {prompt, completion}; the first k rows do not depend on n.

    Raises ValueError when the split is none of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"quantities {split} {seed}")
    rows: dict[str, str] = {}
    while len(rows) < n:
        prompt, number = _draw(rng, split)
        rows[prompt] = number
    return [{"prompt": prompt, "completion": number} for prompt, number in rows.items()]


def _draw(rng: random.Random, split: str) -> tuple[str, str]:
    """A question and its answer. Only random() is used: its numbers are the same in every version of Python."""
    did, do = VERBS[split][int(rng.random() * len(VERBS[split]))]
    first, second = _two(rng, len(THINGS[split]))
    a, b = _two(rng, LARGEST - SMALLEST + 1)
    counted = [(a + SMALLEST, THINGS[split][first]), (b + SMALLEST, THINGS[split][second])]
    if rng.random() < 0.5:
        counted = counted[:1]
    number, thing = counted[int(rng.random() * len(counted))]
    listed = " and ".join(f"{n} {things}" for n, things in counted)
    return f"I {did} {listed}. How many {thing} did I {do}?", str(number)


def _two(rng: random.Random, n: int) -> tuple[int, int]:
    """Two different numbers below n."""
    first, step = int(rng.random() * n), 1 + int(rng.random() * (n - 1))
    return first, (first + step) % n

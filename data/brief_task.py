"""A preference that can be measured: a short answer is preferred to the same answer in a lot of words.

    prompt     What is the capital of France?
    chosen     It is Paris.
    rejected   The capital of France is Paris. It is always good to be curious and to ask questions like this one.

Both answers are right, so that only the manner is to be learnt; and they part at the first word, where the model has a
choice, not at the end, where a preference can be won by making one end rare that was rare before. Rows {prompt, chosen,
rejected, answer} come from the word lists of brief_words.py; a row is a pure function of (split, seed, its number).

    train        four fifths of the facts of five kinds of question
    recombined   the other facts of the same kinds, with fillers that training never shows
    unseen       other kinds of question, and those fillers

`score` says of an output whether it is brief and whether it is right, without looking at the pair.
"""

import random
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from .brief_words import FILLERS, TRAIN_KINDS, UNSEEN_KINDS, Kind

SPLITS = ("train", "recombined", "unseen")
MOST_WORDS = 3


class Score(NamedTuple):
    """Of one output."""

    brief: bool
    """at most MOST_WORDS words"""
    right: bool
    """the answer's words stand in it"""


def make_split(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` rows {prompt, chosen, rejected, answer}; the first k do not depend on n.

    Raises ValueError for another split, and for more rows than it has different ones.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    questions = _questions(split)
    if n > len(questions):
        raise ValueError(f"split {split} has {len(questions)} different questions, asked for {n}")
    rng = random.Random(f"brief {split} {seed}")
    order = sorted(questions, key=lambda _: rng.random())
    return [_row(rng, *question, FILLERS["train" if split == "train" else "held out"]) for question in order[:n]]


def _questions(split: str) -> list[tuple[str, str, str]]:
    """(question, sentence that answers it, bare answer) of every fact and form."""
    kinds: dict[str, Kind] = UNSEEN_KINDS if split == "unseen" else TRAIN_KINDS
    return [
        (question.format(x=asked), kind.sentence.format(x=asked, y=answer), answer)
        for name, kind in kinds.items()
        for asked, answer in kind.facts
        if split == "unseen" or _side(f"{name} {asked}") == split
        for question in kind.questions
    ]


def _side(fact: str) -> str:
    """Every fact belongs to one side for ever, in all the forms in which it is asked."""
    return "recombined" if zlib.crc32(fact.encode()) % 5 == 0 else "train"


def _row(rng: random.Random, question: str, sentence: str, answer: str, fillers: Sequence[str]) -> dict[str, str]:
    filler = fillers[int(rng.random() * len(fillers))]
    return {"prompt": question, "chosen": f"It is {answer}.", "rejected": f"{sentence} {filler}", "answer": answer}


def score(outputs: Sequence[str], rows: Sequence[dict[str, str]]) -> list[Score]:
    """Of each output: is it brief, and is it right?"""
    return [
        Score(0 < len(output.split()) <= MOST_WORDS, _holds(output, row["answer"]))
        for output, row in zip(outputs, rows, strict=True)
    ]


def _holds(output: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", output, re.IGNORECASE) is not None

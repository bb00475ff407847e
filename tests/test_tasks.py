"""data/tasks.py: the splits share nothing they must not, the answers follow from the text, the score is exact."""

import json
import re

import pytest

from data.task_words import (
    FORMS,
    KINDS,
    LAST_NAMES,
    MONTHS,
    NUMBER_WORDS,
    STREETS,
    THINGS,
    WHOLE_NAMES,
    WHOLE_STREETS,
)
from data.tasks import KEYS, SPLITS, field_scores, make_split, score

LISTS = (LAST_NAMES, WHOLE_NAMES, THINGS, STREETS, WHOLE_STREETS, MONTHS)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return {split: make_split(split, 600, seed=1) for split in SPLITS}


def test_rows_are_a_pure_function_of_split_and_seed(splits: dict[str, list[dict]]) -> None:
    for split, rows in splits.items():
        assert make_split(split, 50, seed=1) == rows[:50]
        assert make_split(split, 50, seed=2) != rows[:50]
        assert len({row["input"] for row in rows}) == 600


def test_recombined_rows_are_never_training_rows(splits: dict[str, list[dict]]) -> None:
    held_out = {row["input"] for row in splits["recombined"]}
    for seed in range(3):
        assert not held_out & {row["input"] for row in make_split("train", 3000, seed)}


def test_unseen_words_and_forms_are_nowhere_in_training() -> None:
    assert len(set(FORMS["train"])) >= 25
    assert len(set(FORMS["unseen"])) >= 8
    assert not set(FORMS["train"]) & set(FORMS["unseen"])
    for words in LISTS:
        assert not set(words["train"]) & set(words["unseen"])
        assert len(set(words["train"])) == len(words["train"])
    training = " ".join(row["input"] for row in make_split("train", 6000, seed=0))
    assert len(KINDS) == len(set(KINDS))
    unseen = [word for words in LISTS for word in words["unseen"]]
    assert re.findall(rf"\b(?:{'|'.join(unseen)})s?\b", training) == []


def test_known_rows_use_every_known_form_and_word() -> None:
    text = " ".join(row["input"] for row in make_split("train", 6000, seed=0))
    for words in LISTS:
        assert [word for word in words["train"] if word not in text] == []


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_in_the_text(splits: dict[str, list[dict]], split: str) -> None:
    """Checked from the outside: what the record holds is in the text, what it lacks is not."""
    words = "unseen" if split == "unseen" else "train"
    numbers = {value: word for word, value in NUMBER_WORDS.items()}
    for row in splits[split]:
        text, record = row["input"], json.loads(row["output"])
        assert tuple(record) == KEYS
        assert record["item"] in text
        for key in ("name", "address", "when"):
            assert record[key] is None or record[key] in text or record[key].capitalize() in text
        quantity = record["quantity"]
        said = (str(quantity), numbers.get(quantity, "-"), *(("a", "an") if quantity == 1 else ()))
        assert re.search(rf"\b({'|'.join(said)}) {record['item']}", text, re.IGNORECASE), text
        if record["address"] is None:
            assert not re.search(rf"\d ({'|'.join((*STREETS[words], *WHOLE_STREETS[words]))})\b", text)
        if record["when"] is None:
            assert not re.search(r"day\b|tomorrow|\d:\d\d|\d [ap]m\b|noon", text, re.IGNORECASE)
            assert not re.search(rf"\d ({'|'.join(MONTHS[words])})", text)


def test_texts_start_with_a_capital_and_use_the_right_article(splits: dict[str, list[dict]]) -> None:
    for rows in splits.values():
        for row in rows:
            assert row["input"][0].isupper() or row["input"][0].isdigit()
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\. [a-z]|! [a-z]", row["input"]), row["input"]


def test_score_is_exact_on_the_parsed_record() -> None:
    row = {"output": '{"name": "Zoë", "quantity": 1, "day": null}'}
    right = ['{"name": "Zoë", "quantity": 1, "day": null}', ' {"day":null,\n"quantity":1,"name":"Zo\\u00eb"}\n']
    wrong = [
        '{"name": "Zoë", "quantity": 1}',
        '{"name": "Zoë", "quantity": 1, "day": null, "time": null}',
        '{"name": "Zoë", "quantity": "1", "day": null}',
        '{"name": "Zoë", "quantity": 1.0, "day": null}',
        '{"name": "Zoë", "quantity": true, "day": null}',
        '{"name": "zoë", "quantity": 1, "day": null}',
        '{"name": "Zoë", "quantity": 1, "day": null} Done.',
        '```json\n{"name": "Zoë", "quantity": 1, "day": null}\n```',
        "null",
        "",
        "[" * 100_000,
    ]
    assert score(right + wrong, [row] * (len(right) + len(wrong))) == [True] * len(right) + [False] * len(wrong)
    with pytest.raises(ValueError, match="shorter"):
        score(right, [row])


def test_field_scores_show_what_went_wrong() -> None:
    rows = make_split("train", 4, seed=0)
    outputs = [row["output"] for row in rows]
    broken = json.loads(outputs[0])
    broken["address"] = "Nowhere"
    del broken["when"]
    scores = field_scores([json.dumps(broken), *outputs[1:3], "no JSON"], rows)
    assert scores == {"name": 0.75, "item": 0.75, "quantity": 0.75, "address": 0.5, "when": 0.5}


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="split must be one of train, recombined, unseen, got 'test'"):
        make_split("test", 1)

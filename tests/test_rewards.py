"""trainers/rewards: each rule on answers judged by hand, several together, and what a user's own may get wrong."""

import json
import math
from decimal import Decimal

import pytest

from trainers.rewards import Answer, final_number, make_rewards, score, soft_overlong_punishment


def answers(*texts, wanted="", length=3):
    return [Answer([{"role": "user", "content": "?"}], text, [0] * length, True, wanted, {"n": 1}) for text in texts]


def values(spec, given, longest=64):
    return score(make_rewards([spec], [], max_completion_length=longest), given)[0]


def test_exact_forgives_white_space_around_only():
    assert values("exact", answers("42", " 42\n", "4 2", "The answer is 42", wanted="42 ")) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("He has 5 - 3 = 2 left.\n#### -1,234.50 dollars, not 7", "-1234.5"),
        ("first #### 3 then #### 4", "4"),
        ("It costs $1,000.", "1000"),
        ("5-3", "3"),
        ("x = -3", "-3"),
        ("3.0", "3"),
        (".5 is half", "0.5"),
        ("version 1.2.3", "0.3"),
        ("none here", None),
        ("5 apples #### none", None),
    ],
)
def test_the_final_number(text, number):
    found = final_number(text)
    assert found is None if number is None else found == Decimal(number)


def test_number_compares_values_and_leaves_rows_without_one_alone():
    wanted = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = 72.\n#### 72"
    assert values("number", answers("#### 72", "So it is 72.0", "72 or 73", "", wanted=wanted)) == [1, 1, 0, 0]
    assert math.isnan(values("number", answers("5", wanted="no number"))[0])


def test_json_and_its_fields():
    assert values("json", answers('{"a": 1}', "[1]", "{'a': 1}", "NaN", "[" * 100_000)) == [1, 1, 0, 0, 0]
    wanted = json.dumps({"name": "Ann", "count": 3, "when": None})
    right, half, wrong = '{"count": 3, "when": null, "name": "Ann"}', '{"name": "Ann", "count": 3.0}', "Ann, 3"
    assert values("json_fields", answers(right, half, wrong, "[1]", wanted=wanted)) == [1, 1 / 3, 0, 0]
    assert values("json_fields:name,count", answers(right, half, wanted=wanted)) == [1, 0.5]
    assert math.isnan(values("json_fields", answers("{}", wanted="no record"))[0])


def test_regex_must_match_the_whole_text():
    spec = "regex:<think>.*</think> *<answer>.*</answer>"
    good = "<think>so\nand so</think><answer>4</answer>"
    assert values(spec, answers(good, good + " and more", "4")) == [1, 0, 0]


def test_length_and_overlong_count_tokens():
    assert [values("length:4", answers("x", length=n))[0] for n in (4, 3, 6, 9)] == [1, 0.75, 0.5, 0]
    assert [values("overlong:8", answers("x", length=n), longest=20)[0] for n in (12, 13, 16, 20)] == [
        0,
        -1 / 8,
        -0.5,
        -1,
    ]
    assert soft_overlong_punishment(21, longest=20, margin=8) == -1


def test_several_rewards_add_up_by_weight():
    rewards = make_rewards(["exact", "number", "length:3"], [2.0, 0.5, 1.0], max_completion_length=8)
    totals, each = score(rewards, answers("7", "it is 7", "no", wanted="7"))
    assert totals == [3.5, 1.5, 1.0]
    assert each == {"exact": [1, 0, 0], "number": [1, 1, 0], "length:3": [1, 1, 1]}


OWN = """
def good(answers):
    return [a.row["n"] + len(a.ids) if a.finished else None for a in answers]
def short(answers):
    return [1.0]
def raises(answers):
    raise KeyError("two\\nlines")
def words(answers):
    return ["much"] * len(answers)
def infinite(answers):
    return [float("inf")] * len(answers)
def nothing(answers):
    pass
"""


def test_a_users_own_module_and_file(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    for spec in ("my_rewards:good", f"{tmp_path}/my_rewards.py:good"):
        assert values(spec, answers("a", "b")) == [4, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "reward own.py:short got 2 answers and returned 1 numbers"),
        ("raises", r"reward own.py:raises raised KeyError: 'two\\nlines'$"),
        ("words", "reward own.py:words must return a list of numbers, one for each answer, got list"),
        ("infinite", "reward own.py:infinite returned inf: a reward is a finite number"),
        ("nothing", "reward own.py:nothing must return a list of numbers, one for each answer, got NoneType"),
    ],
)
def test_a_reward_that_fails_is_named_in_one_line(tmp_path, monkeypatch, name, message):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        values(f"own.py:{name}", answers("a", "b"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "exakt",
            "reward 'exakt' is none of exact, number, json, json_fields, regex, length, overlong, and not",
        ),
        ("exact:3", "exact takes nothing after a colon"),
        ("regex:(", r"reward regex:\(: the pattern does not compile"),
        ("length:x", "reward length:x: after the colon comes a number of tokens, at least 1, got 'x'"),
        ("length", "at least 1, got ''"),
        ("overlong:65", "its margin must be at most the longest completion, 64 tokens"),
        ("no_such_module_here:f", "no_such_module_here cannot be imported: ModuleNotFoundError"),
        ("missing.py:f", "missing.py cannot be imported: FileNotFoundError"),
        ("json:dumps_it", "json takes nothing after a colon"),
        ("math:nothing", "math has no function nothing"),
    ],
)
def test_a_name_that_makes_no_reward_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_rewards([spec], [], max_completion_length=64)


def test_the_list_of_rewards_must_make_sense():
    for specs, weights, message in (
        ([], [], "a reward is needed: exact, number"),
        (["exact", "json"], [1.0], "2 rewards need as many weights, got 1"),
        (["exact", "exact"], [], "each reward may be given once, got exact exact"),
    ):
        with pytest.raises(ValueError, match=message):
            make_rewards(specs, weights, max_completion_length=64)

"""data/schema.py: every shape becomes messages; every bad row is one line that names it."""

import pytest

from data import detect, to_messages
from data.schema import to_text

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi"}
HUMAN = {"from": "human", "value": "Hello"}
GPT = {"from": "gpt", "value": "Hi"}


def messages_of(row: dict) -> list[dict]:
    return to_messages(row, detect([row], "rows.jsonl"), "rows.jsonl: row 1")


@pytest.mark.parametrize(
    ("row", "kind", "messages"),
    [
        ({"instruction": "Hello", "output": "Hi"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "Hello", "input": "", "output": "Hi"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "Hello", "input": None, "output": "Hi"}, "alpaca", [USER, ANSWER]),
        (
            {"instruction": "Add", "input": " 1, 2\n", "output": "3"},
            "alpaca",
            [
                {"role": "user", "content": "Add\n\n 1, 2\n", "instruction": "Add", "input": " 1, 2\n"},
                {"role": "assistant", "content": "3"},
            ],
        ),
        ({"prompt": "Hello", "completion": "Hi"}, "prompt_completion", [USER, ANSWER]),
        ({"messages": [USER, ANSWER]}, "messages", [USER, ANSWER]),
        (
            {"messages": [{"role": "system", "content": ""}, USER, ANSWER, USER, {**ANSWER, "name": "bot"}]},
            "messages",
            [{"role": "system", "content": ""}, USER, ANSWER, USER, ANSWER],
        ),
        ({"text": "Hello"}, "text", None),
        (
            {"conversations": [HUMAN, GPT]},
            "sharegpt",
            [USER, ANSWER],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "user", "value": "Hello"},
                    {"from": "assistant", "value": "Hi", "weight": 1},
                    {"from": "human", "value": "Hello"},
                    {"from": "model", "value": "Hi"},
                ]
            },
            "sharegpt",
            [{"role": "system", "content": "Be kind."}, USER, ANSWER, USER, ANSWER],
        ),
        ({"conversations": [USER, ANSWER]}, "messages", [USER, ANSWER]),
        (
            {"messages": [HUMAN, GPT]},
            "sharegpt",
            [USER, ANSWER],
        ),
    ],
)
def test_shapes(row: dict, kind: str, messages: list[dict]) -> None:
    assert detect([row], "rows.jsonl").kind == kind
    if messages is None:
        assert to_text(row, detect([row], "rows.jsonl"), "rows.jsonl: row 1") == row["text"]
        with pytest.raises(ValueError, match=r"^rows.jsonl: row 1: plain text holds no questions and answers$"):
            messages_of(row)
    else:
        assert messages_of(row) == messages


def test_the_explanation_names_the_columns_that_are_not_used() -> None:
    schema = detect([{"id": 1, "instruction": "a", "output": "b", "source": "c"}], "rows.jsonl")
    assert schema.explanation.startswith("alpaca: instruction and input")
    assert schema.explanation.endswith("; columns not used: id, source")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "the columns must be {messages} or {conversations} or {completion, prompt} or .*; found no columns"),
        ({"a": 1}, "the columns must be .*; found a"),
        ({"instruction": "a", "answer": "b"}, "missing 'output' of the alpaca shape .*; found answer, instruction"),
        ({"prompt": "a"}, "missing 'completion' of the prompt_completion shape"),
        ({"id": 1, "chosen": "b"}, "missing 'rejected' of the preference shape"),
    ],
)
def test_columns_of_no_shape(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^rows.jsonl: row 1: {message}"):
        detect([row], "rows.jsonl")


def test_no_rows() -> None:
    with pytest.raises(ValueError, match=r"^rows.jsonl: has no rows$"):
        detect([], "rows.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a"}, "missing 'output'; found instruction"),
        ({"instruction": "a", "output": 7}, "'output' must be text, found a number"),
        ({"instruction": ["a"], "output": "b"}, "'instruction' must be text, found a list"),
        ({"instruction": "a", "input": {}, "output": "b"}, "'input' must be text, found an object"),
        ({"instruction": "a", "output": None}, "'output' must be text, found null"),
        ({"instruction": "a", "output": " \n"}, r"the answer \(message 2\) is empty"),
        ({"instruction": "", "output": "b"}, r"the question \(message 1\) is empty"),
        ({"instruction": "a", "output": "b\ud83d"}, "'output' has half a character at position 1"),
    ],
)
def test_bad_alpaca_rows(row: dict, message: str) -> None:
    schema = detect([{"instruction": "a", "output": "b"}], "rows.jsonl")
    with pytest.raises(ValueError, match=f"^rows.jsonl: row 3: {message}$"):
        to_messages(row, schema, "rows.jsonl: row 3")


SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "'messages' must be a list with messages in it, found text"),
        ([], "'messages' must be a list with messages in it, found an empty list"),
        ([USER, "Hi"], "message 2 must be an object with role and content, found text"),
        (
            [USER, {"role": "bot", "content": "Hi"}],
            "message 2: role must be one of system, user, assistant, found 'bot'",
        ),
        ([USER, {"role": 1, "content": "Hi"}], "message 2: 'role' must be text, found a number"),
        ([USER, {"role": "assistant"}], "message 2: missing 'content'; found role"),
        ([USER, {"role": "assistant", "content": None}], "message 2: 'content' must be text, found null"),
        ([USER, {"role": "assistant", "content": [{"text": "Hi"}]}], "message 2: 'content' must be text, found a list"),
        ([ANSWER, USER], "message 1 must be from user, found assistant"),
        ([USER, USER, ANSWER], "message 2 must be from assistant, found user"),
        ([USER, SYSTEM, ANSWER], "message 2 must be from assistant, found system"),
        ([SYSTEM, ANSWER], "message 2 must be from user, found assistant"),
        ([USER, ANSWER, USER], r"the last message must be an answer \(role assistant\), found role user"),
        ([SYSTEM], r"the last message must be an answer \(role assistant\), found role system"),
        ([USER, {"role": "assistant", "content": ""}], r"the answer \(message 2\) is empty"),
    ],
)
def test_bad_messages(messages: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^rows.jsonl: row 1: {message}$"):
        messages_of({"messages": messages})


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (
            [HUMAN, {"from": "bing", "value": "b"}],
            "message 2: from must be one of system, human, user, gpt, assistant, model, found 'bing'",
        ),
        ([{"from": "gpt", "value": "a"}], "message 1 must be from user, found assistant"),
        (
            [HUMAN, {"role": "gpt", "value": "b"}],
            "message 2: missing 'from'; found role, value",
        ),
        ([{"from": "human", "value": 1}], "message 1: 'value' must be text, found a number"),
        ([{"from": "h\x1b[2J" + "u" * 999, "value": "a"}], r"message 1: from must be .*found 'h\\x1b\[2Ju{55}…'"),
        ({"from": "human"}, "'conversations' must be a list with messages in it, found an object"),
    ],
)
def test_bad_sharegpt(conversation: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^rows.jsonl: row 1: {message}$"):
        messages_of({"conversations": conversation})

"""What a file's rows mean: which columns make the question, and which the answer.

    alpaca              {instruction, input?, output}       user: instruction, a blank line, input · assistant: output
    prompt_completion   {prompt, completion}                user: prompt · assistant: completion
    messages            {messages: [{role, content}, …]}    as they stand: system?, then user, assistant, user, …

`detect` looks at the columns of the first row and says in a sentence what it found; `to_messages` turns one row into
messages and checks it. Every error names the file and the row, counted from 1 (in csv the header is not a row).
A further shape is a line in SHAPES and a function from row to messages. Known but not read yet: see OTHER_SHAPES.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chat import Message, question

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Schema:
    """The shape of a file's rows, and a sentence that says how they are read."""

    kind: str
    explanation: str


def detect(rows: Sequence[Mapping[str, Any]], path: str) -> Schema:
    """The shape of `rows`, from the first one. Raises ValueError when its columns are no shape that is read here."""
    if not rows:
        raise ValueError(f"{path}: has no rows")
    columns = set(rows[0])
    for kind, shape in SHAPES.items():
        if shape.required <= columns:
            unused = sorted(columns - shape.required - shape.optional)
            note = f"; columns not used: {', '.join(unused)}" if unused else ""
            return Schema(kind, f"{kind}: {shape.explanation}{note}")
    raise ValueError(f"{path}: row 1: {_why_no_shape(columns)}; found {', '.join(sorted(columns)) or 'no columns'}")


def to_messages(row: Mapping[str, Any], schema: Schema, where: str) -> list[Message]:
    """One row → its messages, ending in an answer. `where` ("orders.jsonl: row 3") begins every error.

    Raises ValueError for a missing column, a value that is no text, a blank question or answer, an unknown role, and
    turns out of order.
    """
    messages = SHAPES[schema.kind].to_messages(row, where)
    _check_order([message["role"] for message in messages], where)
    for number, message in enumerate(messages, start=1):
        if message["role"] != "system" and not message["content"].strip():
            what = "answer" if message["role"] == "assistant" else "question"
            raise ValueError(f"{where}: the {what} (message {number}) is empty")
    return messages


def _alpaca(row: Mapping[str, Any], where: str) -> list[Message]:
    given = _text(row, "input", where) if row.get("input") is not None else None
    asked = question(_text(row, "instruction", where), given)
    return [asked, {"role": "assistant", "content": _text(row, "output", where)}]


def _prompt_completion(row: Mapping[str, Any], where: str) -> list[Message]:
    return _one_turn(_text(row, "prompt", where), _text(row, "completion", where))


def _messages(row: Mapping[str, Any], where: str) -> list[Message]:
    messages = _value(row, "messages", where)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list with messages in it, found {_kind(messages)}")
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object with role and content, found {_kind(message)}")
    role = _text(message, "role", where)
    if role not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, found {role!r}")
    return {"role": role, "content": _text(message, "content", where)}


def _one_turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _check_order(roles: list[str], where: str) -> None:
    """system?, then user and assistant in turns, an answer last."""
    turns = roles[1:] if roles[0] == "system" else roles
    first = len(roles) - len(turns) + 1
    for i, role in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(f"{where}: message {first + i} must be from {expected}, found {role}")
    if len(turns) % 2 or not turns:
        raise ValueError(f"{where}: the last message must be an answer (role assistant), found role {roles[-1]}")


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = _value(row, column, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} must be text, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {column!r} has half a character at position {error.start}") from error
    return value


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise ValueError(f"{where}: missing {column!r}; found {', '.join(sorted(row)) or 'nothing'}")
    return row[column]


def _kind(value: Any) -> str:
    """A value's type, in the words of JSON."""
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", str: "text", int: "a number", float: "a number", type(None): "null"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), type(value).__name__)


@dataclass(frozen=True)
class _Shape:
    required: frozenset[str]
    optional: frozenset[str]
    explanation: str
    to_messages: Callable[[Mapping[str, Any], str], list[Message]]


SHAPES = {
    "messages": _Shape(
        frozenset({"messages"}), frozenset(), "the messages as they stand; every assistant message is learnt", _messages
    ),
    "prompt_completion": _Shape(
        frozenset({"prompt", "completion"}),
        frozenset(),
        "prompt is the user's turn in the model's chat template and completion the answer that is learnt; a model "
        "without a template gets the text itself: prompt, newline, completion",
        _prompt_completion,
    ),
    "alpaca": _Shape(
        frozenset({"instruction", "output"}),
        frozenset({"input"}),
        "instruction and input, a blank line between, are the user's turn; output is the answer that is learnt",
        _alpaca,
    ),
}

OTHER_SHAPES = {"conversations": "ShareGPT", "chosen": "preference", "text": "plain text"}


def _why_no_shape(columns: set[str]) -> str:
    """The nearest shape's missing columns, or the shapes there are."""
    for column, name in OTHER_SHAPES.items():
        if column in columns:
            return f"{column!r} makes this {name} data, which is not read here (shapes: {', '.join(SHAPES)})"
    nearest = max(SHAPES, key=lambda kind: len(SHAPES[kind].required & columns))
    required = SHAPES[nearest].required
    if not required & columns:
        wanted = " or ".join(f"{{{', '.join(sorted(shape.required))}}}" for shape in SHAPES.values())
        return f"the columns must be {wanted}"
    missing = ", ".join(repr(column) for column in sorted(required - columns))
    return f"missing {missing} of the {nearest} shape {{{', '.join(sorted(required))}}}"

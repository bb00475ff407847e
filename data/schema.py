"""What a file's rows mean: which columns make the question, and which the answer.

    messages            {messages: [{role, content}, …]}       as they stand: system?, then user, assistant, user, …
    sharegpt            {conversations: [{from, value}, …]}    human, user → user · gpt, assistant, model → assistant
    prompt_completion   {prompt, completion}                   user: prompt · assistant: completion
    alpaca              {instruction, input?, output}          user: instruction, blank line, input · assistant: output
    preference          {prompt?, chosen, rejected}            two answers to one prompt (preference.py)
    text                {text}                                 a document: no question, every token is learnt
    template            any columns                            told by flags only: flags.py, template.py

`detect` looks at the columns of the first row, in this order, and says in a sentence what it found. `to_messages` turns
one row into messages and checks it; `to_text` does so for plain text. Every error names the file and the row, counted
from 1 (in csv the header is not a row). A further shape is a line in SHAPES and a function from row to messages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chat import Message, question
from .columns import checked_text, kind_of, lookup, names
from .template import Template, fill

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Schema:
    """The shape of a file's rows, and a sentence that says how they are read."""

    kind: str
    explanation: str
    column: str | None = None
    """Path of the list of messages or of the text, where it is not the shape's own column."""
    question: Template | None = None
    """Of kind template."""
    answer: Template | None = None
    """Of kind template; of kind text, where the document is made of several columns."""
    system: Template | None = None
    """System message for conversations that bring none; where it comes out blank there is none."""


def detect(rows: Sequence[Mapping[str, Any]], path: str) -> Schema:
    """The shape of `rows`, from the first one. Raises ValueError when its columns are no shape that is read here."""
    if not rows:
        raise ValueError(f"{path}: has no rows")
    columns = set(rows[0])
    for kind, shape in SHAPES.items():
        if shape.required <= columns:
            unused = sorted(columns - shape.required - shape.optional)
            if kind in ("messages", "sharegpt"):
                (column,) = shape.required
                return list_of_messages(rows[0], column, path, unused=unused)
            return explained(kind, shape.explanation, unused)
    raise ValueError(f"{path}: row 1: {_why_no_shape(columns)}; found {names(sorted(columns)) or 'no columns'}")


def list_of_messages(
    row: Mapping[str, Any], column: str, path: str, *, unused: Sequence[str] = (), kind: str = ""
) -> Schema:
    """The schema of a column that holds a list of messages: the keys of the first one tell which kind they are."""
    messages = lookup(row, column, f"{path}: row 1")
    keys = messages[0] if isinstance(messages, list) and messages and isinstance(messages[0], dict) else {}
    if not kind:
        by_name = "sharegpt" if column == "conversations" else "messages"
        kind = "sharegpt" if "from" in keys else "messages" if "role" in keys else by_name
    return explained(kind, SHAPES[kind].explanation, unused, column=column)


def explained(kind: str, sentence: str, unused: Sequence[str] = (), **fields: Any) -> Schema:
    """A schema with its sentence, which also names the columns that are not used."""
    note = f"; columns not used: {names(unused)}" if unused else ""
    return Schema(kind, f"{kind}: {sentence}{note}", **fields)


def to_messages(row: Mapping[str, Any], schema: Schema, where: str) -> list[Message]:
    """One row → its messages, ending in an answer. `where` ("orders.jsonl: row 3") begins every error.

    Raises ValueError for a missing column, a value that is no text, a blank question or answer, an unknown role, and
    turns out of order; and for plain text.
    """
    read = _template if schema.kind == "template" else SHAPES[schema.kind].to_messages
    messages = read(row, schema, where)
    messages = with_system(messages, row, schema, where)
    check_messages(messages, where)
    return messages


def with_system(messages: list[Message], row: Mapping[str, Any], schema: Schema, where: str) -> list[Message]:
    """The messages, with the schema's system message in front where they bring none."""
    if schema.system is None or (messages and messages[0]["role"] == "system"):
        return messages
    system = fill(schema.system, row, where)
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def check_messages(messages: Sequence[Message], where: str) -> None:
    """Raises ValueError for turns out of order, and for a blank question or answer."""
    _check_order([message["role"] for message in messages], where)
    for number, message in enumerate(messages, start=1):
        if message["role"] != "system" and not message["content"].strip():
            what = "answer" if message["role"] == "assistant" else "question"
            raise ValueError(f"{where}: the {what} (message {number}) is empty")


def to_text(row: Mapping[str, Any], schema: Schema, where: str) -> str:
    """One row of plain text → its document, which may be empty. Raises ValueError for a missing or wrong column."""
    return fill(schema.answer, row, where) if schema.answer else _text(row, schema.column or "text", where)


def messages_at(row: Mapping[str, Any], path: str, where: str, *, sharegpt: bool = False) -> list[Message]:
    """The messages of the list at `path`, their roles in our words. Raises ValueError for anything else there."""
    if sharegpt:
        return _each(row, path, where, "from", "value", SHAREGPT_ROLES)
    return _each(row, path, where, "role", "content", {role: role for role in ROLES})


def _messages(row: Mapping[str, Any], schema: Schema, where: str) -> list[Message]:
    return messages_at(row, schema.column or "messages", where)


def _sharegpt(row: Mapping[str, Any], schema: Schema, where: str) -> list[Message]:
    return messages_at(row, schema.column or "conversations", where, sharegpt=True)


def _prompt_completion(row: Mapping[str, Any], _: Schema, where: str) -> list[Message]:
    return _one_turn(_text(row, "prompt", where), _text(row, "completion", where))


def _alpaca(row: Mapping[str, Any], _: Schema, where: str) -> list[Message]:
    given = _text(row, "input", where) if row.get("input") is not None else None
    asked = question(_text(row, "instruction", where), given)
    return [asked, {"role": "assistant", "content": _text(row, "output", where)}]


def _no_messages(_row: Mapping[str, Any], _: Schema, where: str) -> list[Message]:
    raise ValueError(f"{where}: plain text holds no questions and answers")


def _no_single_answer(_row: Mapping[str, Any], _: Schema, where: str) -> list[Message]:
    raise ValueError(
        f"{where}: a pair of answers is for qlora dpo and orpo; to learn the chosen ones alone, where they are texts: "
        "--prompt-column prompt --completion-column chosen"
    )


def _template(row: Mapping[str, Any], schema: Schema, where: str) -> list[Message]:
    if schema.question is None or schema.answer is None:
        raise ValueError(f"{where}: the shape template needs a template for the question and one for the answer")
    return _one_turn(fill(schema.question, row, where), fill(schema.answer, row, where))


def _one_turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _each(
    row: Mapping[str, Any], path: str, where: str, role_key: str, text_key: str, roles: Mapping[str, str]
) -> list[Message]:
    """The messages of a list, their roles in our words."""
    items = lookup(row, path, where)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{where}: {names([path], repr)} must be a list with messages in it, found {kind_of(items)}")
    messages = []
    for number, item in enumerate(items, start=1):
        place = f"{where}: message {number}"
        if not isinstance(item, dict):
            raise ValueError(f"{place} must be an object with {role_key} and {text_key}, found {kind_of(item)}")
        role = _text(item, role_key, place)
        if role not in roles:
            raise ValueError(f"{place}: {role_key} must be one of {', '.join(roles)}, found {names([role], repr)}")
        messages.append({"role": roles[role], "content": _text(item, text_key, place)})
    return messages


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


def _text(row: Mapping[str, Any], path: str, where: str) -> str:
    return checked_text(lookup(row, path, where), path, where)


@dataclass(frozen=True)
class _Shape:
    required: frozenset[str]
    optional: frozenset[str]
    explanation: str
    to_messages: Callable[[Mapping[str, Any], Schema, str], list[Message]]


DOCUMENT = "is a document, cut into pieces of max_seq_length; every token is learnt, there is no question"
NONE: frozenset[str] = frozenset()
SHAPES = {
    "messages": _Shape(
        frozenset({"messages"}), NONE, "the messages as they stand; every assistant message is learnt", _messages
    ),
    "sharegpt": _Shape(
        frozenset({"conversations"}),
        NONE,
        "human (or user) asks; gpt (or assistant, model) gives the answers that are learnt",
        _sharegpt,
    ),
    "prompt_completion": _Shape(
        frozenset({"prompt", "completion"}),
        NONE,
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
    "preference": _Shape(
        frozenset({"chosen", "rejected"}),
        frozenset({"prompt"}),
        "two answers to a prompt, of which chosen is to become likelier than rejected; where both are conversations, "
        "the messages they share are the prompt",
        _no_single_answer,
    ),
    "text": _Shape(frozenset({"text"}), NONE, f"text {DOCUMENT}", _no_messages),
}


def _why_no_shape(columns: set[str]) -> str:
    """The nearest shape's missing columns, or the shapes there are."""
    nearest = max(SHAPES, key=lambda kind: len(SHAPES[kind].required & columns))
    required = SHAPES[nearest].required
    if not required & columns:
        wanted = " or ".join(f"{{{', '.join(sorted(shape.required))}}}" for shape in SHAPES.values())
        return f"the columns must be {wanted}, or told, as in --template '{{question}} => {{answer}}'"
    missing = ", ".join(repr(column) for column in sorted(required - columns))
    return f"missing {missing} of the {nearest} shape {{{', '.join(sorted(required))}}}"

"""The flags that say how data is read: the same in every command, so that all of them see the same rows.

How the rows mean something is detected (schema.py), unless a flag tells it, in one of four ways:

    --template "{question} => {answer}"                    columns into one prompt and one answer (template.py)
    --prompt-column data.q --completion-column data.a      two columns, by path (columns.py)
    --messages-column chat.turns                           a list of messages
    --text-column body                                     plain text

or --shape, which also says what --template makes: `--shape text --template "{title}\\n\\n{body}"` makes documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .columns import names
from .schema import DOCUMENT, SHAPES, Schema, detect, explained, list_of_messages
from .template import Template, column, parse_question_and_answer, parse_template


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Which rows, and how they are read."""

    data: str
    """Training rows: FILE.jsonl, .json, .csv, .parquet or .txt (or .gz of these), FOLDER:SPLIT, or a FOLDER of .txt."""
    eval_data: str | None = None
    """Held-out rows: a file, read as --data is."""
    eval_fraction: float = 0.0
    """Hold out this share of --data, chosen at random (--data-seed); equal rows stay on one side."""
    eval_where: str | None = None
    """Hold out the rows of --data with this value in a column: split=validation."""
    train_where: str | None = None
    """Train only on the rows of --data with this value in a column: split=train."""
    shape: Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "preference", "text"] = "auto"
    """What a row is; auto tells it by the columns of the first row, and says what it found."""
    template: str | None = None
    """Columns into prompt and answer: "{question} => {answer}"; with "{a}[[\\n{b}]] => …" an empty b leaves no line."""
    completion_template: str | None = None
    """The answer apart from --template, which then holds the question only and may have a => of its own."""
    system: str | None = None
    """System message of rows that bring none: a text, or a template such as "{system_prompt}"."""
    prompt_column: str | None = None
    """Path of the question: data.question."""
    completion_column: str | None = None
    """Path of the answer."""
    messages_column: str | None = None
    """Path of a list of messages (role and content, or from and value)."""
    text_column: str | None = None
    """Path of plain text."""
    turns: int = 1
    """Merge single-turn rows, at random, into conversations of this many turns."""
    row_reuse: bool = True
    """With --turns n, each row is used n times an epoch, once in every turn (as Unsloth does it); without, once."""
    data_seed: int = 0
    """Seed of --eval-fraction and --turns."""


def schema_of(flags: DataFlags, rows: Sequence[Mapping[str, Any]], path: str) -> Schema:
    """The shape that the flags tell, or else the one detected.

    Raises ValueError, naming the flag, when flags contradict each other or a template does not parse.
    """
    schema = _told(flags, rows, path)
    if flags.system is None:
        return schema
    if schema.kind == "text":
        raise ValueError("--system: plain text has no messages, and so no system message")
    return replace(schema, system=parse_template(flags.system, "--system"))


def _told(flags: DataFlags, rows: Sequence[Mapping[str, Any]], path: str) -> Schema:
    _check_one_way(flags)
    columns = sorted(rows[0]) if rows else []
    if flags.template is not None and flags.shape == "text":
        document = parse_template(flags.template, "--template")
        return explained("text", f"--template {DOCUMENT}", _unused(columns, document), answer=document)
    if flags.template is not None or flags.prompt_column is not None:
        question, answer = _question_and_answer(flags)
        sentence = f"{_shown(question)} is the user's turn; {_shown(answer)} is the answer that is learnt"
        unused = _unused(columns, question, answer)
        return explained("template", sentence, unused, question=question, answer=answer)
    if flags.text_column is not None:
        unused = _unused(columns, column(flags.text_column))
        return explained("text", f"{flags.text_column} {DOCUMENT}", unused, column=flags.text_column)
    if flags.messages_column is not None:
        kind = "" if flags.shape == "auto" else flags.shape
        return list_of_messages(rows[0], flags.messages_column, path, kind=kind)
    return detect(rows, path) if flags.shape == "auto" else explained(flags.shape, SHAPES[flags.shape].explanation)


def _question_and_answer(flags: DataFlags) -> tuple[Template, Template]:
    if flags.prompt_column is not None and flags.completion_column is not None:
        return column(flags.prompt_column), column(flags.completion_column)
    return parse_question_and_answer(flags.template or "", flags.completion_template)


WAYS = {
    "--template": ("template", ("auto", "text")),
    "--prompt-column": ("prompt_column", ("auto", "prompt_completion")),
    "--messages-column": ("messages_column", ("auto", "messages", "sharegpt")),
    "--text-column": ("text_column", ("auto", "text")),
}


def _check_one_way(flags: DataFlags) -> None:
    given = [flag for flag, (field, _) in WAYS.items() if getattr(flags, field) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both say what a row is: give one of them")
    for flag in given:
        if flags.shape not in WAYS[flag][1]:
            raise ValueError(f"{flag} does not go with --shape {flags.shape}, only with {', '.join(WAYS[flag][1])}")
    if flags.completion_template is not None and (flags.template is None or flags.shape == "text"):
        raise ValueError("--completion-template is the answer to the question that --template makes: give both")
    if (flags.prompt_column is None) != (flags.completion_column is None):
        raise ValueError("--prompt-column and --completion-column go together: give both or neither")


def _unused(columns: Sequence[str], *templates: Template) -> list[str]:
    used = {path for template in templates for path in template.columns}
    used |= {path.split(".")[0] for path in used}
    return [name for name in columns if name not in used]


def _shown(template: Template) -> str:
    """What a template is made of, in a word."""
    return names(template.columns) or "a fixed text"

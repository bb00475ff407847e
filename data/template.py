"""A template with placeholders turns the columns of a row into one text.

    {question}                     the value of a column; {data.question} and {answers.text.0} reach inside (columns.py)
    [[ Context: {context}\\n ]]     an optional part: it vanishes when its first column is empty (null, or blank text)
    {{  }}   [[[[  ]]]]            the brackets themselves
    \\n  \\t  \\\\                    newline, tab and backslash, since a shell passes no newline on easily

One flag tells question from answer: what stands before => is the user's turn, what stands after it the answer.

    {question} => {answer}                       GSM8K
    {instruction}[[\\n\\n{input}]] => {output}     Alpaca

White space around => belongs to neither. A text that needs => itself is given as two templates.

A template is parsed before any value is put in, so that brackets in the data are only text. Every column that it names
must be there, in optional parts too: a missing one is an error that names the row. It has no loops and no references to
other templates; its length, and the length of what it makes, are bounded.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .columns import as_text, lookup

ARROW = "=>"
MAX_TEMPLATE_CHARS = 100_000
MAX_FILLED_CHARS = 64 * 2**20
LITERALS = {"{{": "{", "}}": "}", "[[[[": "[[", "]]]]": "]]", "\\n": "\n", "\\t": "\t", "\\\\": "\\"}
TOKEN = re.compile(r"\{\{|\}\}|\[\[\[\[|\]\]\]\]|\[\[|\]\]|\{[^{}]*\}|[{}]|\\[nt\\]")


@dataclass(frozen=True)
class Slot:
    """The place of a column's value."""

    path: str


@dataclass(frozen=True)
class OptionalPart:
    """Parts that are there only when the first column among them is not empty."""

    parts: tuple[str | Slot, ...]
    first: str


@dataclass(frozen=True)
class Template:
    """Texts, slots and optional parts, in order."""

    parts: tuple[str | Slot | OptionalPart, ...]

    @property
    def columns(self) -> list[str]:
        """The path of every slot, in order."""
        inside = [part.parts if isinstance(part, OptionalPart) else (part,) for part in self.parts]
        return [part.path for parts in inside for part in parts if isinstance(part, Slot)]


def parse_template(source: str, name: str = "template") -> Template:
    """Source → template. Raises ValueError, beginning with `name` and with the place, for brackets that do not pair."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ValueError(f"{name}: {len(source):,} characters, at most {MAX_TEMPLATE_CHARS:,}")
    parts: list[str | Slot | OptionalPart] = []
    inside: list[str | Slot] | None = None
    opened = 0
    for place, kind, text in _tokens(source, name):
        if kind == "[[" and inside is None:
            inside, opened = [], place
        elif kind == "]]" and inside is not None:
            parts.append(_optional(inside, f"{name}: the optional part at character {opened}"))
            inside = None
        elif kind in ("[[", "]]"):
            what = "'[[' inside an optional part" if kind == "[[" else "']]' without '[['"
            raise ValueError(f"{name}: {what} at character {place}; a literal {kind} is written {kind * 2}")
        else:
            piece = Slot(text) if kind == "slot" else text
            (parts if inside is None else inside).append(piece)
    if inside is not None:
        raise ValueError(f"{name}: '[[' at character {opened} is not closed; a literal [[ is written [[[[")
    return Template(tuple(parts))


def parse_question_and_answer(template: str, completion: str | None = None) -> tuple[Template, Template]:
    """One text with => in it, or the two sides apart → the templates of question and answer.

    Raises ValueError, naming the flag, when there is not exactly one =>, and for an answer that names no column.
    """
    name = "--completion-template"
    if completion is None:
        name = f"--template: what stands after '{ARROW}'"
        if template.count(ARROW) != 1:
            raise ValueError(
                f"--template: one '{ARROW}' must stand between the question and the answer, as in "
                f"'{{question}} {ARROW} {{answer}}'; found {template.count(ARROW)}"
            )
        template, completion = (side.strip() for side in template.split(ARROW))
    question, answer = parse_template(template, "--template"), parse_template(completion, name)
    if not answer.columns:
        raise ValueError(f"{name} names no column, so that every row would have the same answer")
    return question, answer


def fill(template: Template, row: Mapping[str, Any], where: str) -> str:
    """The template's text for one row.

    Raises ValueError, beginning with `where`, for a missing column, a value that is neither text nor a number, and a
    result longer than MAX_FILLED_CHARS.
    """
    values = {path: as_text(lookup(row, path, where), path, where) for path in template.columns}
    texts: list[str] = []
    for part in template.parts:
        if isinstance(part, OptionalPart):
            texts += [_text(inner, values) for inner in part.parts] if values[part.first].strip() else []
        else:
            texts.append(_text(part, values))
    if (length := sum(map(len, texts))) > MAX_FILLED_CHARS:
        raise ValueError(f"{where}: the template makes {length:,} characters of it, at most {MAX_FILLED_CHARS:,}")
    return "".join(texts)


def column(path: str) -> Template:
    """The template that is one column's value."""
    return Template((Slot(path),))


def _tokens(source: str, name: str) -> Iterator[tuple[int, str, str]]:
    """(character from 1, "text" | "slot" | "[[" | "]]", the text or the slot's path)."""
    position = 0
    for match in TOKEN.finditer(source):
        token, place = match[0], match.start() + 1
        if match.start() > position:
            yield position + 1, "text", source[position : match.start()]
        position = match.end()
        if token in LITERALS:
            yield place, "text", LITERALS[token]
        elif token in ("[[", "]]"):
            yield place, token, token
        elif token in ("{", "}"):
            raise ValueError(f"{name}: {token!r} at character {place} has no partner; a literal {token} is {token * 2}")
        elif path := token[1:-1].strip():
            yield place, "slot", path
        else:
            raise ValueError(f"{name}: {{}} at character {place} names no column; literal braces are doubled")
    if position < len(source):
        yield position + 1, "text", source[position:]


def _optional(parts: list[str | Slot], where: str) -> OptionalPart:
    first = next((part.path for part in parts if isinstance(part, Slot)), None)
    if first is None:
        raise ValueError(f"{where} names no column; literal [[ and ]] are written [[[[ and ]]]]")
    return OptionalPart(tuple(parts), first)


def _text(part: str | Slot, values: Mapping[str, str]) -> str:
    return values[part.path] if isinstance(part, Slot) else part

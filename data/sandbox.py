"""A chat template is a program that came with a model: where it runs, and how much it may do.

jinja2's ImmutableSandboxedEnvironment keeps it away from Python: no underscore attributes, no files, no imports, no
changes to the messages. The rest is set as transformers sets it, so that a template gives the same text here and
there: trim_blocks, lstrip_blocks, break and continue, tojson that leaves <>&' and non-ASCII alone, raise_exception,
strftime_now, {% generation %}, and a namespace that takes no underscore names.

A sandboxed template could still run for ever or fill the memory. So every loop turn and every call is a step, a
rendering has MAX_STEPS of them, and no text or list longer than MAX_LENGTH comes out of + * ~ or the whole template.
Left out: a filter's own width (`center(10 ** 8)`) and a list that holds itself many times over are not counted. They
waste memory; they reach nothing. lipsum, jinja2's text generator, is not there, and a loop may not be recursive.
"""

import json
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
MAX_LENGTH = 50_000_000

_steps_left: ContextVar[int] = ContextVar("steps left in this rendering")


@lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """Source → a template that `run` can render. Raises ValueError with the template's line when it does not parse."""
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {_one_line(error.message)}") from error
    except Exception as error:
        raise ValueError(f"chat template does not compile: {_one_line(error)}") from error


def run(template: Template, **variables: Any) -> str:
    """Render within the limits. Raises ValueError, in one line, for whatever stops the template."""
    token = _steps_left.set(MAX_STEPS)
    pieces, length = [], 0
    try:
        for piece in template.generate(**variables):
            length += len(piece)
            _check_length(length)
            pieces.append(piece)
    except Exception as error:  # foreign code: whatever it raises is its refusal
        raise ValueError(f"chat template refuses this conversation: {_one_line(error)}") from error
    finally:
        _steps_left.reset(token)
    return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        _step()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _step()
        if operator == "**" and not (_is_small(left) and _is_small(right)):
            raise SecurityError("** of numbers above 64")
        if operator == "*":
            _check_length(_length(left) * right if isinstance(right, int) else 0)
            _check_length(_length(right) * left if isinstance(left, int) else 0)
        if operator == "+":
            _check_length(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)


class _Counted(NodeTransformer):
    """Puts the counting into a parsed template: every loop's items and every result of ~ pass through a filter."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        if node.recursive:
            raise TemplateSyntaxError("recursive loops are not supported", node.lineno)
        node.iter = _filtered(node.iter, "counted_items")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, "counted_text")


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks answers for other trainers; the text inside is all that is used."""

    tags = {"generation"}  # noqa: RUF012, jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:  # self is in args, so that namespace(self=…) works
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class _Dict:
    """What a template may do with `dict`: call it, and fromkeys."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters |= {"tojson": _tojson, "counted_items": _counted_items, "counted_text": _counted_text}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    del environment.globals["lipsum"]
    return environment


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_context  # keeps jinja2 from running it once, at compile time
def _counted_items(_context: Context, items: Iterable) -> Iterator:
    for item in items:
        _step()
        yield item


@pass_context
def _counted_text(_context: Context, text: str) -> str:
    _step()
    _check_length(len(text))
    return text


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _step() -> None:
    left = _steps_left.get() - 1
    if left < 0:
        raise SecurityError(f"more than {MAX_STEPS:,} loop turns and calls")
    _steps_left.set(left)


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise SecurityError(f"a text or list longer than {MAX_LENGTH:,}")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= 64


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with an underscore in front, got {name!r}")


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""A chat template is a program that came with a model: where it runs, and what it may use.

jinja2's ImmutableSandboxedEnvironment keeps it away from Python: no underscore attributes, no files, no imports, no
changes to the messages. The rest is set as transformers sets it, so that a template gives the same text here and
there: trim_blocks, lstrip_blocks, break and continue, tojson that leaves <>&' and non-ASCII alone, raise_exception,
strftime_now, {% generation %}, and a namespace that takes no underscore names.

A sandboxed template could still run for ever or fill the memory, so everything it computes is paid for (budget.py): the
parsed template is rewritten so that loops, lists, comparisons and prints pass through filters that count (counting.py),
and the methods, filters and tests it can call are those of which the cost is known. A template is at most MAX_TEMPLATE
characters. Left out, since nobody's template needs them: include, import, recursive loops, autoescape blocks, lipsum,
cycler, joiner, and filters for web pages or random answers.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from . import budget
from .counting import COUNTERS, Counted

MAX_TEMPLATE = 100_000
MAX_MESSAGE = 300


def _words(*lines: str) -> set[str]:
    return set(" ".join(lines).split())


FILTERS = _words(
    "abs capitalize count d default dictsort e escape first float format groupby indent int items last length list",
    "lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum title trim",
    "truncate unique upper",
)
"""what jinja2 has of them; join and tojson are written here"""
CHECKS: dict[str, Callable[..., None]] = {
    "replace": budget.check_replace,
    "indent": budget.check_indent,
    "format": budget.check_percent,
    "list": budget.check_as_list,
    "sort": budget.check_as_list,
    "groupby": budget.check_as_list,
    "title": budget.check_as_list,
    "int": budget.check_digits,
    "float": budget.check_digits,
    "round": budget.check_round,
    "sum": budget.check_sum,
}
"""filter → what looks at its arguments first"""
FREE = _words("count d default first last length")
SHALLOW = _words("items list reverse")
LAZY = _words("map reject rejectattr select selectattr")
"""filters that go through nothing; through the members and not what they hold; through the members as they are asked"""
TESTS_THAT_READ = _words("== != < > <= >= eq equalto ne lt lessthan le gt greaterthan ge in lower upper")

METHODS: dict[type, set[str]] = {
    str: _words(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower",
        "isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace",
        "rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper",
    ),
    list: _words("copy count index"),
    tuple: _words("count index"),
    dict: _words("copy get items keys values"),
}


TEXT_CHECKS = {"replace": budget.check_replace} | dict.fromkeys(
    ("rfind", "rindex", "rpartition", "rsplit"), budget.check_search_from_the_end
)
"""method of a text → what looks at its arguments first"""


@lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """Source → a template that `run` can render. Raises ValueError with the template's line when it does not parse."""
    if len(source) > MAX_TEMPLATE:
        raise ValueError(f"a chat template has at most {MAX_TEMPLATE:,} characters, got {len(source):,}")
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {_one_line(error.message)}") from error
    except Exception as error:
        raise ValueError(f"chat template does not compile: {_one_line(error)}") from error


def run(template: Template, **variables: Any) -> str:
    """Render within the budget. Raises ValueError, in one line, for whatever stops the template."""
    pieces, length = [], 0
    try:
        with budget.budget():
            for piece in template.generate(**variables):
                length = budget.fits(length + len(piece))
                pieces.append(piece)
    except Exception as error:  # foreign code: whatever it raises is its refusal
        raise ValueError(f"chat template refuses this conversation: {_one_line(error)}") from error
    return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return Counted().visit(super()._parse(source, name, filename))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget.step()
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if owner is not None:
            _check_method(owner, name)
        if isinstance(owner, str) and name == "join" and args:
            return budget.made(budget.join(owner, args[0]))
        if isinstance(owner, str) and name in TEXT_CHECKS:
            TEXT_CHECKS[name](owner, *args, **kwargs)
        if owner is not None:
            budget.read(*args, *([] if isinstance(owner, dict) else [owner]))
        return budget.made(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            if value.__name__ != "format":
                raise SecurityError(f"str has no method {value.__name__!r} here")
            budget.check_format(value.__self__, *args, **kwargs)
            return function(*args, **kwargs)

        return checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget.step()
        budget.check_binop(operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            budget.read(argument)
        return super().getitem(obj, argument)


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

    def __repr__(self) -> str:  # jinja2's prints what it holds, itself among it
        return "<Namespace>"


class _Dict:
    """What a template may do with `dict`: call it, and fromkeys."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    filters = {name: _bounded_filter(name, environment.filters[name]) for name in FILTERS}
    environment.filters = filters | COUNTERS | {"join": _join, "tojson": _tojson}
    environment.tests = {name: _bounded_test(name, test) for name, test in environment.tests.items()}
    environment.globals = {
        "range": environment.globals["range"],
        "dict": _Dict(),
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _bounded_filter(name: str, function: Callable) -> Callable:
    @pass_context  # keeps jinja2 from running it once, at compile time
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget.step()
        if name in LAZY and isinstance(value, budget.SIZED):
            value = budget.counted(value)
        elif name in SHALLOW:
            budget.touched(value)
        elif name not in FREE:
            budget.read(value, *args, *kwargs.values())
        if name in CHECKS:
            CHECKS[name](value, *args, **kwargs)
        result = function(*_first_arguments(function, context), value, *args, **kwargs)
        is_lazy = isinstance(result, Iterator) and not isinstance(result, LoopContext)
        return budget.counted(result) if is_lazy else budget.made(result)

    return bounded


def _bounded_test(name: str, function: Any) -> Callable:
    @pass_context
    def bounded(context: Context, value: Any, *args: Any) -> Any:
        budget.step()
        if name in TESTS_THAT_READ:
            budget.read(value, *args)
        return function(*_first_arguments(function, context), value, *args)

    return bounded


def _first_arguments(function: Callable, context: Context) -> list[Any]:
    """What jinja2 would put before a filter's value."""
    kind = getattr(function, "jinja_pass_arg", None)
    offered = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
    return [] if kind is None else [offered[kind.name]]


@pass_context
def _join(context: Context, value: Iterable, d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return budget.made(budget.join(str(d), value))


@pass_context
def _tojson(context: Context, value: Any, *args: Any, **kwargs: Any) -> str:
    budget.step()
    budget.read(value)
    return budget.made(budget.tojson(value, *args, **kwargs))


def _check_method(owner: Any, name: str) -> None:
    if isinstance(owner, LoopContext | _Dict):
        return
    for kind, names in METHODS.items():
        if isinstance(owner, kind) and name in names:
            return
    raise SecurityError(f"{type(owner).__name__} has no method {name!r} here")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > MAX_MESSAGE:
        raise SecurityError(f"a date format of more than {MAX_MESSAGE} characters")
    return datetime.now().strftime(format)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with an underscore in front, got {name!r}")


def _one_line(error: object) -> str:
    """What the template or jinja2 says, without line ends or control characters, cut short."""
    text = " ".join(str(error)[: 4 * MAX_MESSAGE].split()) or type(error).__name__
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + " …"

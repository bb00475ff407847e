"""data/budget.py and data/sandbox.py: a template that means harm ends in one line, in bounded time and memory.

Every attack runs with memory limited by the system to 256 MB above what the process had, and processor time to a minute
for all of them. The budget is scaled down, so that those that run until it is used up are quick too. That
templates of the field give the same text as without a budget is checked in tests/peers.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data import render
from data.sandbox import MAX_TEMPLATE

ROOT = Path(__file__).parents[1]
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
LOOPS, END = "{% for i in range(99999) %}{% for j in range(99999) %}", "{% endfor %}{% endfor %}"
GROW = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"

STEPS = "more than 20,000 loop turns and calls"
PAID = "more than 2,000,000 characters written and gone through"
LARGE = "a text or list larger than 1,000,000"
DEEP = "maximum recursion depth exceeded"
ATTACKS = {
    "loops": (LOOPS + END, STEPS),
    "a filtered loop": ("{% for a in range(99999) if a < 0 and a < 0 %}{% endfor %}", STEPS),
    "steps given back": (LOOPS + "{{ (-9999) | counted_body }}" + END, STEPS),
    "steps given back by name": (LOOPS + "{{ [-9999] | map('counted_body') | list }}" + END, STEPS),
    "text given back": ("{% set x = 'a' * 900000 %}{% for i in range(999) %}{{ (-9999999) | counted_text }}"
                        "{% set y = x ~ i %}{% endfor %}", PAID),
    "turns given back": ("{% for i in range(9999) | counted_items(-99) %}{% for j in range(9999) %}" + END, STEPS),
    "prints": (LOOPS + "{{ i }}" + END, STEPS),
    "filters": (LOOPS + "{% set x = i | abs %}" + END, STEPS),
    "calls": (LOOPS + "{% set x = namespace() %}" + END, STEPS),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(90) }}", STEPS),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DEEP),
    "macros in a ring": (
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}", DEEP),
    "a block that holds itself": ("{% block a %}{{ self.a() }}{% endblock %}", DEEP),
    "a recursive loop": ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursive loops are not"),
    "statements that are no calls": (LOOPS + "{% set x = i %}" * 800 + END, STEPS),
    "lazy filters": (LOOPS + "{% set x = range(100000) | selectattr('x') | list %}" + END, STEPS),
    "lazy filters in a row": ("{% set x = range(99999)" + " | select" * 60 + " | list %}", STEPS),
    "a large range": ("{{ range(1000000000) }}", "Range too big"),
    "maxima": (LOOPS + "{% set x = range(100000) | max %}" + END, PAID),
    "sorting": ("{% set a = range(9000) | list %}" + LOOPS + "{% set x = a | sort %}" + END, PAID),
    "comparing": ("{% set a = 'x' * 400000 %}{% set b = 'x' * 400000 %}" + LOOPS + "{{ a == b }}" + END, PAID),
    "comparing lists": ("{% set a = [1] * 9000 %}{% set b = [1] * 9000 %}" + LOOPS + "{{ a == b }}" + END, PAID),
    "searching": ("{% set a = 'x' * 400000 %}" + LOOPS + "{{ 'y' in a }}" + END, PAID),
    "finding": ("{% set a = 'x' * 400000 %}" + LOOPS + "{{ a.find('y') }}" + END, PAID),
    "finding from the end": ("{{ ('x' * 900000).rfind('xy' ~ 'x' * 400000) }}", PAID),
    "changed": ("{% set a = [1] * 9000 %}{% set b = [1] * 9000 %}" + LOOPS
                + "{% set x = loop.changed(a if j is odd else b) %}" + END, PAID),
    "hashing": ("{% set t = (1,) * 9000 %}{% set d = {t: 1} %}" + LOOPS + "{% set x = d[t] %}" + END, PAID),
    "hashing in get": ("{% set t = (1,) * 9000 %}{% set d = {t: 1} %}" + LOOPS + "{% set x = d.get(t) %}" + END, PAID),
    "many variables": ("{% set x = 'a' * 990000 %}"
                       + "".join(f"{{% set a{i} = x[1:] %}}" for i in range(300)), PAID),
    "a long text in a loop": (
        "{% set x %}{% for i in range(9999) %}" + "a" * 90_000 + "{% endfor %}{% endset %}", PAID),
    "a long text in a macro": ("{% macro f() %}" + "a" * 90_000 + "{% endmacro %}" + LOOPS + "{% set x = f() %}" + END,
                               PAID),
    "doubling a block": (
        "{% set x %}" + "a" * 1000 + "{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60, PAID),
    "printing": ("{% set x = 'a' * 300000 %}{% for i in range(99999) %}{{ x }}{% endfor %}", LARGE),
    "times": ("{{ 'a' * 10000000000 }}", LARGE),
    "times from the left": ("{{ 10000000000 * [1] }}", LARGE),
    "plus": ("{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", LARGE),
    "~": ("{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", LARGE),
    "~ of many": ("{% set x = 'a' * 900000 %}{{ " + " ~ ".join(["x"] * 500) + " }}", LARGE),
    "a list twice in a list": (GROW + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}", LARGE),
    "a dict twice in a dict": (
        GROW.replace("[1]", "{}") + "{% set n.x = dict(a=n.x.items(), b=n.x.items()) %}{% endfor %}{{ n.x }}", PAID),
    "arguments in arguments": ("{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}{{ varargs }}"
                               "{% endif %}{% endmacro %}{{ f(60) }}", PAID),
    "a deep list": ("{% set n = namespace(x=[1]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}", PAID),
    "a deep list printed": ("{{ " + "[" * 900 + "]" * 900 + " }}", DEEP),
    "powers": ("{{ 9 ** 9 ** 9 }}", "** of numbers above 64"),
    "large numbers": (GROW.replace("[1]", "3") + "{% set n.x = n.x * n.x %}{% endfor %}", "more than 4,096 bits"),
    "digits": ("{{ ('9' * 900000) | int }}", "a number of more than 4,000 digits"),
    "rounding": ("{{ 1.5 | round(999999999, 'ceil') }}", "rounding to more than 64 digits"),
    "sums of lists": ("{{ ([[1]] * 3000) | sum(start=[]) }}", "a sum that does not start at a number"),
    "a long separator": ("{{ range(100000) | join('a' * 900000) }}", LARGE),
    "a long separator of join()": ("{{ ('a' * 900000).join(range(100000) | map('string')) }}", LARGE),
    "replace": ("{{ ('a' * 900000) | replace('a', 'a' * 900000) }}", LARGE),
    "replace()": ("{{ ('a' * 900000).replace('', 'a' * 900000) }}", LARGE),
    "replace in map": ("{{ (['a' * 90] * 1000) | map('replace', 'a', 'a' * 1000) | list }}", PAID),
    "indent": ("{{ ('\n' * 900000) | indent(900000) }}", LARGE),
    "a list of characters": ("{{ ('é' * 990000) | list }}", LARGE),
    "words": ("{{ ('é ' * 490000).split(' ') }}", LARGE),
    "a title": ("{{ ('a ' * 490000) | title }}", LARGE),
    "% with a width": ("{{ '%9999999999d' % 1 }}", "a width of more than 999, a * or a name in a % format"),
    "% with a *": ("{{ '%*d' % (999999999, 1) }}", "a width of more than 999, a * or a name in a % format"),
    "% many times": ("{{ ('%s' * 100000) % 1 }}", LARGE),
    "format()": ("{{ '{:9999999999}'.format(1) }}", "a width or other instruction in format()"),
    "format() in format()": ("{{ '{:{}}'.format(1, 999999999) }}", "a width or other instruction in format()"),
    "format() many times": ("{{ ('{0}' * 100000).format('a' * 100000) }}", LARGE),
    "format_map": ("{{ '{a:999999999}'.format_map({'a': 1}) }}", "str has no method 'format_map' here"),
    "center": ("{{ 'a'.center(999999999) }}", "str has no method 'center' here"),
    "a filter that is not there": ("{{ 'a' | center(999999999) }}", "line 1: No filter named 'center'"),
    "bytes": ("{{ (5).to_bytes(999999999, 'little') }}", "int has no method 'to_bytes' here"),
    "tojson with an indent": ("{{ [[1]] | tojson(indent=999999999) }}", "an indent or a separator above 64"),
    "tojson with a separator": ("{{ [[1]] | tojson(separators=('a' * 900000, '')) }}", "a separator above 64"),
    "a date": ("{{ strftime_now('%c' * 400000) }}", "a date format of more than 300 characters"),
    "parentheses": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", DEEP),
    "nots": ("{{ " + "not " * 20000 + "1 }}", DEEP),
    "loops in loops": ("{% for i in [1] %}" * 300 + "{% endfor %}" * 300, DEEP),
    "a large template": ("a" * (MAX_TEMPLATE + 1), "a chat template has at most 100,000 characters, got 100,001"),
    "include": ("{% include '/etc/passwd' %}", "line 1: other files cannot be read"),
    "import": ("{% import 'a' as b %}", "line 1: other files cannot be read"),
    "from": ("{% from 'a' import b %}", "line 1: other files cannot be read"),
    "extends": ("{% extends 'a' %}", "line 1: other files cannot be read"),
    "autoescape": ("{% autoescape true %}{% endautoescape %}", "line 1: autoescape is not supported"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    "attributes in format()": ("{{ '{0.__class__.__name__}'.format([]) }}", "attribute '__class__' of 'list'"),
    "attributes by name": ("{{ messages | map(attribute='__class__.x') | list }}", "attribute '__class__' of 'dict'"),
    "globals": ("{{ raise_exception.__globals__.x }}", "access to attribute '__globals__'"),
    "cycler": ("{{ cycler('a') }}", "'cycler' is undefined"),
    "undefined": ("{{ nothing.at.all }}", "'nothing' is undefined"),
    "a terminal's control characters": ("{{ raise_exception('\x1b[2J\x07') }}", "?[2J?"),
}  # fmt: skip

RUN = """
import json, resource, sys, time
from data import budget, render
budget.MAX_STEPS, budget.MAX_PAID, budget.MAX_SIZE = 20_000, 2_000_000, 1_000_000
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
attacks, messages = json.load(sys.stdin)
said = {}
for name, template in attacks.items():
    try:
        said[name] = "rendered: " + render(template, messages, bos_token="<s>", eos_token="</s>")[:80]
    except ValueError as error:
        said[name] = str(error)
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each attack ends with, all of them run in one process."""
    if sys.platform != "linux":
        pytest.skip("limits of memory as they are set here are Linux's")
    attacks = json.dumps([{name: template for name, (template, _) in ATTACKS.items()}, MESSAGES])
    ran = subprocess.run([sys.executable, "-c", RUN], input=attacks, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_in_one_line(said: dict[str, str], name: str) -> None:
    assert ATTACKS[name][1] in said[name]
    assert said[name].isprintable()
    assert len(said[name]) < 400


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'In 2024: %s, %5.2f%%' % ('a', 1.5) }}{{ 7 % 4 }}", "In 2024: a,  1.50%3"),
        ("{{ 'Time: {} {{literal: 1}} {name}'.format(5, name='b') }}", "Time: 5 {literal: 1} b"),
        ("{{ ['a', 'b'] | map('upper') | join('-') }}{{ none | select | list }}{{ x | select | list }}", "A-B[][]"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first }}", "Hello"),
        ("{{ messages | join('; ', attribute='role') }}{{ ', '.join(['x', 'y']) }}", "user; assistantx, y"),
        ("{{ 'a\nb' | indent(2, true) }}{{ 'aXbX' | replace('X', '--', 1) }}", "  a\n  ba--bX"),
        ("{% macro f() %}{{ varargs | length }}{{ kwargs }}{% endmacro %}{{ f(1, 2, context=3) }}", "2{'context': 3}"),
        ("{{ [3, 1] | sort }}{{ [1, 2] | sum }}{{ '7' | int + 1 }}{{ 2.567 | round(1) }}", "[1, 3]382.6"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}{{ (1, 2)[::-1] }}", "a=1(2, 1)"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}{% set x %}c{% endset %}{{ x }}{{ 1 < 2 < 3 }}", "ABcTrue"),
        ("{% if messages | selectattr('x') %}a lazy filter is true{% endif %}", "a lazy filter is true"),
        ("{{ namespace(a=1) }}{{ 'a b'.split() }}{{ 'abc'.rfind('b') }}", "<Namespace>['a', 'b']1"),
    ],
)  # fmt: skip
def test_what_a_template_may_do_is_as_jinja2_does_it(template: str, text: str) -> None:
    assert render(template, MESSAGES, bos_token=None, eos_token=None) == text


def test_a_long_conversation_is_within_the_budget() -> None:
    messages = [{"role": role, "content": "Hello " * 500} for _ in range(500) for role in ("user", "assistant")]
    template = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] and '<think>' not in m.content %}"
        "{{ '<' + m.role + '>' + m.content | trim + '</>\n' }}{% endif %}{% endfor %}"
    )
    text = render(template, messages, bos_token=None, eos_token=None)
    assert len(re.findall("<user>", text)) == 500
    assert len(text) > 2_900_000

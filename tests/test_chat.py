"""data/chat.py and data/sandbox.py: rendering as transformers sets it up. Templates that mean harm: test_budget.py.

That whole templates give transformers' text is checked against transformers itself in tests/peers.
"""

import re
from datetime import datetime

import pytest

from data import budget, render, template_of
from tests.toy_tokenizer import CHATML, ToyTokenizer

MESSAGES = [{"role": "user", "content": "<b> & 'é'"}, {"role": "assistant", "content": "Xin chào\n"}]


def rendered(template: str, messages: list[dict] = MESSAGES, **options: object) -> str:
    return render(template, messages, **{"bos_token": "<s>", "eos_token": "</s>", **options})


def test_chatml() -> None:
    text = "<|im_start|>user\n<b> & 'é'<|im_end|>\n<|im_start|>assistant\nXin chào\n<|im_end|>\n"
    assert rendered(CHATML) == text
    assert rendered(CHATML, add_generation_prompt=True) == text + "<|im_start|>assistant\n"


def test_the_plain_form() -> None:
    turn = "<b> & 'é'\nXin chào\n</s>"
    assert rendered(template_of(ToyTokenizer(None))) == turn
    assert rendered(template_of(ToyTokenizer(None, bos_token="<s>"))) == turn
    assert rendered(template_of(ToyTokenizer(None, bos_token="<s>", adds_bos=True))) == "<s>" + turn
    assert rendered(template_of(ToyTokenizer(None)), MESSAGES[:1], add_generation_prompt=True) == "<b> & 'é'\n"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{{ messages[0].content | tojson }}", "\"<b> & 'é'\""),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  2\n ],\n "b": 1\n}'),
        ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "02"),
        ("{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + loop.length %}{% endfor %}{{ s.n }}",
         "4"),
        ("{% generation %}\n{{ messages[1].content | trim }}{% endgeneration %}!", "Xin chào!"),
        ("{{ bos_token }}{{ dict(a=1).a }}{{ dict.fromkeys('x').x }}{{ eos_token ~ 1 ~ 'b' }}", "<s>1None</s>1b"),
        ("{{ tools is none }}{{ documents is none }}{{ unheard_of is defined }}", "TrueTrueFalse"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(2 ** 3) }}{{ 'a' * 3 }}{{ [1] + [2] }}", "[8]aaa[1, 2]"),
    ],
)  # fmt: skip
def test_set_up_as_transformers_does(template: str, text: str) -> None:
    assert rendered(template) == text


def test_a_token_that_the_model_lacks_is_undefined() -> None:
    assert rendered("[{{ bos_token }}]", bos_token=None) == "[]"


def test_strftime_now() -> None:
    assert rendered("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must\n alternate') }}", "refuses this conversation: Roles must alternate"),
        ("a\n{% for %}", "chat template, line 2: "),
        ("{{ x.y.z }}", "refuses this conversation: 'x' is undefined"),
        ("{{ 1 + 'a' }}", "refuses this conversation: unsupported operand"),
        ("{{ messages[5].content }}", "refuses this conversation: list object has no element 5"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__'"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "no name with an underscore"),
        ("{{ namespace(_x=1) }}", "no name with an underscore"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_what_a_template_may_not_do(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        rendered(template)
    assert "\n" not in str(error.value)


def test_each_rendering_has_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_STEPS", 1001)
    for _ in range(2):
        assert rendered("{% for a in range(1000) %}{% endfor %}done") == "done"
    with pytest.raises(ValueError, match="more than 1,001 loop turns and calls"):
        rendered("{% for a in range(1001) %}{% endfor %}done")


def test_the_messages_stay_as_they_were() -> None:
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(ValueError, match="access to attribute 'update' of 'dict' object is unsafe"):
        rendered("{% for m in messages %}{{ m.update({'content': ''}) }}{% endfor %}", messages)
    assert messages == MESSAGES

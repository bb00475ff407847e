"""Messages become text: a model's own chat template, one of formats.py, or the plain one where it has none.

A message is {"role": "system" | "user" | "assistant", "content": text}. A question made of an instruction and an input
carries these two besides, for templates that write them apart. A template writes the messages one after the
other, each between the marks that the model was trained with, and after `add_generation_prompt` the mark that asks for
an answer. ChatML, as an example:

    <|im_start|>user⏎Hello<|im_end|>⏎<|im_start|>assistant⏎Hi!<|im_end|>⏎

The plain form, for base models: each message, a newline, the answer, EOS; in front BOS if the tokenizer adds one.
The Tokenizer that this room needs is a Protocol, so that data/ depends on no model.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from .sandbox import compile_template, run

Message = dict[str, str]

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


class Tokenizer(Protocol):
    """What data/ asks of a tokenizer; models.tokenizer.Tokenizer has it."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def bos_token(self) -> str | None: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def adds_bos(self) -> bool: ...
    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def encode_with_offsets(
        self, text: str, *, parse_special: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


def question(instruction: str, given: str | None = None) -> Message:
    """A user's message: the instruction, and after a blank line what it is about, if anything."""
    if not given:
        return {"role": "user", "content": instruction}
    return {"role": "user", "content": f"{instruction}\n\n{given}", "instruction": instruction, "input": given}


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool = False,
) -> str:
    """Messages → text. Raises ValueError when the template does not parse, refuses the messages, or goes on for ever.

    A template that asks for the date (`strftime_now`) gets today's, as in transformers: its text changes at midnight.
    """
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    return run(
        compile_template(template),
        messages=[dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
        **{name: token for name, token in tokens.items() if token is not None},
    )


def template_of(tokenizer: Tokenizer) -> str:
    """The tokenizer's chat template, or the plain one."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    return "{{ bos_token }}" + PLAIN_TEMPLATE if tokenizer.adds_bos else PLAIN_TEMPLATE


def end_of_answer(tokenizer: Tokenizer) -> str | None:
    """The special token that the template writes after an answer, if any: a chat model's EOS is not always it."""
    special = tuple(tokenizer.special_tokens)
    return _end_of_answer(template_of(tokenizer), tokenizer.bos_token, tokenizer.eos_token, special)


@lru_cache(maxsize=16)
def _end_of_answer(template: str, bos_token: str | None, eos_token: str | None, special: tuple[str, ...]) -> str | None:
    """Seen after the answer of a tiny conversation."""
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = render(template, probe, bos_token=bos_token, eos_token=eos_token)
    except ValueError:
        return None
    found = any_of(special, before=r"\s*").match(text.rpartition("answer")[2])
    return found[0].strip() if found else None


@lru_cache(maxsize=64)
def any_of(tokens: tuple[str, ...], before: str = "") -> re.Pattern[str]:
    """Matches any of the texts, the longest first, as tokenizers do; never, where there is none."""
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})")

"""Answers to the prompts of a dataset, and how many are right. Shared by probe and demo."""

import json
from collections.abc import Sequence
from typing import Any

from data.encode import encode_prompt
from models import Completion, Decoder, Tokenizer, generate

Messages = list[dict[str, str]]


def answer(
    model: Decoder,
    tokenizer: Tokenizer,
    conversations: Sequence[Messages],
    *,
    max_new_tokens: int,
    batch_size: int = 50,
) -> tuple[list[str], list[Completion]]:
    """The model's greedy answer in place of each conversation's last turn, as text and as ids."""
    prompts = [encode_prompt(tokenizer, messages[:-1]) for messages in conversations]
    completions: list[Completion] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        completions += generate(model, batch, max_new_tokens=max_new_tokens, stop_ids=tokenizer.eos_ids)
    return [tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions], completions


def exact_matches(answers: Sequence[str], wanted: Sequence[str]) -> list[bool]:
    """Whether each answer is the one wanted: as a JSON value where it is one, else as text, ends trimmed."""
    return [_value(got) == _value(want) for got, want in zip(answers, wanted, strict=True)]


def json_fields(answers: Sequence[str], wanted: Sequence[str]) -> float | None:
    """Share of the wanted JSON objects' fields that are given exactly; None unless every wanted answer is one."""
    right = total = 0
    for got, want in zip(answers, wanted, strict=True):
        target, value = _value(want), _value(got)
        if not isinstance(target, dict):
            return None
        total += len(target)
        right += sum(isinstance(value, dict) and key in value and value[key] == target[key] for key in target)
    return right / total if total else None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()

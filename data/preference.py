"""Preference data: a prompt and two answers, of which people (or a rule) prefer one.

    {prompt, chosen, rejected}     prompt: a question, or a list of messages · answers: text, or a list of messages
    {chosen, rejected}             two conversations: the messages with which both begin are the prompt

Lists of messages are {role, content} or ShareGPT's {from, value}; one message may stand without its list. Conversations
that bring their own prompt win over a prompt column that is text.

    prompt     <|im_start|>user⏎2+2?<|im_end|>⏎<|im_start|>assistant⏎      the same ids in both, masked
    chosen     4<|im_end|>                                                  1 1
    rejected   Adding is fun!<|im_end|>                                     1 1 1 1 1

Each answer is tokenized apart from the prompt (encode.py), so the prompt's ids are equal in both and are those that
generation starts from. As everywhere, what is too long loses its end. Counted, and left out since nothing is to be
learnt from them: ties, where both answers are equal (or become so when they are cut), and pairs of which an answer lies
wholly beyond max_seq_length. An empty answer is an error that names its row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .chat import Message, Tokenizer
from .columns import checked_text, lookup
from .encode import Encoded, cut, encode_messages
from .schema import Schema, check_messages, messages_at, with_system

WHOLE = 2**31


class Pair(NamedTuple):
    """One row: a conversation that waits for an answer, and how it goes on, twice."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class EncodedPair:
    """Both conversations as ids; the first `prompt_length` are equal. The masks mark the answers."""

    chosen: Encoded
    rejected: Encoded
    prompt_length: int

    @property
    def tokens(self) -> int:
        return len(self.chosen.ids) + len(self.rejected.ids)


@dataclass(frozen=True)
class PairReport:
    """What became of the rows of a file."""

    rows: int
    pairs: int
    """that are learnt from"""
    ties: int
    truncated: int
    dropped: int
    tokens: int
    chosen_tokens: int
    """in answers"""
    rejected_tokens: int
    longest: int

    def __str__(self) -> str:
        means = f"chosen {self.chosen_tokens / self.pairs:.1f}, rejected {self.rejected_tokens / self.pairs:.1f}"
        kept = f"{self.pairs:,} pairs, {self.tokens:,} tokens (an answer on average: {means}), longest {self.longest:,}"
        left_out = f"{self.ties:,} ties left out, {self.dropped:,} dropped"
        return f"{kept}; {self.truncated:,} cut at the end, {left_out}"


@dataclass(frozen=True)
class EncodedPairs:
    """The pairs that can be learnt from, the row (from 0) of each, the counts."""

    pairs: list[EncodedPair]
    row_indices: list[int]
    report: PairReport


def encode_pairs(
    tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], schema: Schema, *, max_seq_length: int, path: str
) -> EncodedPairs:
    """Every row of a file → pairs. Raises ValueError, naming the row, for a bad one, and when none is left."""
    pairs, row_indices, ties, truncated, dropped = [], [], 0, 0, 0
    for i, row in enumerate(rows):
        where = f"{path}: row {i + 1}"
        pair = to_pair(row, schema, where)
        try:
            encoded = encode_pair(tokenizer, pair, max_seq_length=max_seq_length)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        learnable = encoded.chosen.n_learnt > 0 and encoded.rejected.n_learnt > 0
        is_tie = learnable and encoded.chosen.ids == encoded.rejected.ids
        truncated += encoded.chosen.n_truncated > 0 or encoded.rejected.n_truncated > 0
        dropped += not learnable
        ties += is_tie
        if learnable and not is_tie:
            pairs.append(encoded)
            row_indices.append(i)
    if not pairs:
        raise ValueError(
            f"{path}: nothing to learn: of {len(rows)} rows {ties} are ties, and {dropped} have an answer that lies "
            f"beyond max_seq_length {max_seq_length}"
        )
    report = PairReport(
        rows=len(rows),
        pairs=len(pairs),
        ties=ties,
        truncated=truncated,
        dropped=dropped,
        tokens=sum(pair.tokens for pair in pairs),
        chosen_tokens=sum(pair.chosen.n_learnt for pair in pairs),
        rejected_tokens=sum(pair.rejected.n_learnt for pair in pairs),
        longest=max(len(side.ids) for pair in pairs for side in (pair.chosen, pair.rejected)),
    )
    return EncodedPairs(pairs, row_indices, report)


def encode_pair(tokenizer: Tokenizer, pair: Pair, *, max_seq_length: int) -> EncodedPair:
    """One pair → ids and masks. Raises ValueError as encode_messages does, and when the template writes two prompts."""
    first = len(pair.prompt)
    chosen, rejected = (
        encode_messages(tokenizer, [*pair.prompt, *answer], max_seq_length=WHOLE, learn_from=first)
        for answer in (pair.chosen, pair.rejected)
    )
    start = chosen.completion_mask.index(1)
    if rejected.completion_mask.index(1) != start or chosen.ids[:start] != rejected.ids[:start]:
        raise ValueError("the chat template writes the prompt before chosen otherwise than before rejected")
    return EncodedPair(cut(chosen, max_seq_length), cut(rejected, max_seq_length), start)


def to_pair(row: Mapping[str, Any], schema: Schema, where: str) -> Pair:
    """One row → prompt and two answers. `where` ("pairs.jsonl: row 3") begins every error.

    Raises ValueError for a missing column, a value that is neither text nor messages, an empty answer or question,
    turns out of order, and conversations that do not part at an answer.
    """
    prompt = _messages(row, "prompt", "user", where) if row.get("prompt") is not None else []
    chosen, rejected = (_messages(row, name, "assistant", where) for name in ("chosen", "rejected"))
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        shared = _shared(chosen, rejected, where)
        if isinstance(row.get("prompt"), list) and chosen[: len(prompt)] != prompt:
            prompt = [*prompt, *chosen[:shared]]
        else:
            prompt = chosen[:shared]
        chosen, rejected = chosen[shared:], rejected[shared:]
    if not prompt:
        raise ValueError(f"{where}: missing 'prompt': chosen and rejected are answers alone")
    prompt = with_system(prompt, row, schema, where)
    check_messages([*prompt, *chosen], f"{where}: chosen")
    check_messages([*prompt, *rejected], f"{where}: rejected")
    return Pair(prompt, chosen, rejected)


def _messages(row: Mapping[str, Any], name: str, role: str, where: str) -> list[Message]:
    """The column's messages: a text is one of `role`."""
    value = lookup(row, name, where)
    if isinstance(value, str):
        return [{"role": role, "content": checked_text(value, name, where)}]
    items = [value] if isinstance(value, dict) else value
    keys = items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}
    return messages_at({name: items}, name, where, sharegpt="from" in keys)


def _shared(chosen: Sequence[Message], rejected: Sequence[Message], where: str) -> int:
    """How many messages both conversations begin with, before an answer of each."""
    most = min(len(chosen), len(rejected)) - 1  # of two equal conversations, the last answer is the one compared
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if shared == 0 or messages[shared]["role"] != "assistant":
            at, role = shared + 1, messages[shared]["role"]
            raise ValueError(
                f"{where}: chosen and rejected must be the same up to an answer; message {at} of {name} is from {role}"
            )
    return shared

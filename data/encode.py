"""A conversation becomes token ids and a mask of what is learnt, by construction.

    text    <|im_start|>user⏎2+2?<|im_end|>⏎<|im_start|>assistant⏎ ┃ 4<|im_end|> ⏎
    mask    0 0 0 0 …                                              ┃ 1 1         0

Learnt is each answer and the end token after it, so that the model learns to stop; nothing else. `learn` may also be
"last", the last answer alone, or "everything", every token. If the template writes no end token after the last answer,
what it writes there is dropped and EOS is put, and learnt: generation stops on ids, not on texts such as "USER:".

 - The text before an answer is tokenized apart from the answer (the ┃), so that training sees exactly the ids that
   generation starts from. Everything else is tokenized as one text, as transformers does: the ids are the same unless
   a token would reach across the ┃ (an answer that starts with a newline, in ChatML; where a newline is a word of its
   own, as in GPT-2, the two that end Llama 3's prompt) or the end token is missing.
 - A tokenizer that puts a space before every text (SentencePiece's) puts none before an answer: it goes on with a text.
 - Special tokens are read only in the template's own text. "<|im_end|>" inside a message stays plain text.
 - BOS is what the template writes. Tokenizers here never add one, and two in front become one.
 - An example longer than max_seq_length loses its end; one with nothing learnt left is dropped. Both are counted.

`show` prints an example in colour, as `qlora inspect data` does.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Literal

from rich.text import Text

from .chat import Message, Tokenizer, any_of, end_of_answer, render, template_of
from .documents import document_pieces
from .schema import Schema, to_messages, to_text
from .spans import Rendering, Span, locate

Learn = Literal["answers", "last", "everything"]
LEARN: tuple[Learn, ...] = ("answers", "last", "everything")

LEARNT, CONTEXT = "green", "dim"
LEGEND = Text.assemble(
    ("learnt", LEARNT), " · ", ("context, masked", CONTEXT), " · ", ("special token", "bold"), " · ⏎ newline · ⇥ tab"
)
VISIBLE = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡", ord("\n"): "⏎\n", ord("\t"): "⇥"}


@dataclass(frozen=True)
class Encoded:
    """One example: ids (T,), completion_mask (T,) with 1 = learnt, and how many tokens were cut from its end."""

    ids: list[int]
    completion_mask: list[int]
    n_truncated: int = 0

    @property
    def n_learnt(self) -> int:
        """Tokens that count in the loss: the first token of a sequence has nothing before it to be predicted from."""
        return sum(self.completion_mask[1:])


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows of a file."""

    rows: int
    truncated: int
    dropped: int
    tokens: int
    learnt_tokens: int
    longest: int
    examples: int

    def __str__(self) -> str:
        kept = f"{self.examples:,} examples, {self.tokens:,} tokens ({self.learnt_tokens:,} learnt)"
        return f"{kept}, longest {self.longest:,}; {self.truncated:,} cut at the end, {self.dropped:,} dropped"


@dataclass(frozen=True)
class EncodedDataset:
    """The examples that can be learnt, the row (from 0) that each came from (a document gives several), the counts."""

    examples: list[Encoded]
    row_indices: list[int]
    report: EncodeReport


def encode_dataset(
    tokenizer: Tokenizer,
    rows: Sequence[Mapping],
    schema: Schema,
    *,
    max_seq_length: int,
    path: str,
    learn: Learn = "answers",
) -> EncodedDataset:
    """Every row of a file → examples. Raises ValueError, naming the row, for a bad one, and when none is left."""
    examples, row_indices, truncated, dropped = [], [], 0, 0
    for i, row in enumerate(rows):
        where = f"{path}: row {i + 1}"
        if schema.kind == "text":
            found = _encode_document(tokenizer, to_text(row, schema, where), max_seq_length, where)
        else:
            messages = to_messages(row, schema, where)
            try:
                found = [encode_messages(tokenizer, messages, max_seq_length=max_seq_length, learn=learn)]
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        kept = [example for example in found if example.n_learnt > 0]
        truncated += any(example.n_truncated > 0 for example in found)
        dropped += not kept
        examples += kept
        row_indices += [i] * len(kept)
    if not examples:
        raise ValueError(
            f"{path}: nothing to learn: none of {len(rows)} rows has a token of its answer within "
            f"max_seq_length {max_seq_length}"
        )
    report = EncodeReport(
        rows=len(rows),
        truncated=truncated,
        dropped=dropped,
        tokens=sum(len(example.ids) for example in examples),
        learnt_tokens=sum(example.n_learnt for example in examples),
        longest=max(len(example.ids) for example in examples),
        examples=len(examples),
    )
    return EncodedDataset(examples, row_indices, report)


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    max_seq_length: int,
    learn: Learn = "answers",
    learn_from: int = 0,
) -> Encoded:
    """One conversation → ids and mask, cut to max_seq_length. Answers before message `learn_from` are context.

    Raises ValueError when the template refuses the conversation, when an answer cannot be placed, and when an end
    token is needed but the tokenizer has none.
    """
    if max_seq_length < 1:
        raise ValueError(f"max_seq_length must be at least 1, got {max_seq_length}")
    if learn not in LEARN:
        raise ValueError(f"learn must be one of {', '.join(LEARN)}, got {learn!r}")
    ids, mask = _encode(tokenizer, messages, learn, learn_from=learn_from)
    return cut(Encoded(ids, mask), max_seq_length)


def cut(encoded: Encoded, max_seq_length: int) -> Encoded:
    """The first max_seq_length tokens."""
    ids, mask = encoded.ids[:max_seq_length], encoded.completion_mask[:max_seq_length]
    return Encoded(ids, mask, encoded.n_truncated + len(encoded.ids) - len(ids))


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """A conversation that waits for an answer → the ids that generation starts from. Raises ValueError as above.

    They are the ids before the answer in `encode_messages` of the answered conversation, whenever the template's text
    with the generation prompt is the beginning of its text with the answer.
    """
    return _encode(tokenizer, messages, "answers", add_generation_prompt=True)[0]


def _encode_document(tokenizer: Tokenizer, text: str, max_seq_length: int, where: str) -> list[Encoded]:
    """Plain text: every token is learnt that has one before it."""
    try:
        pieces = document_pieces(tokenizer, text, max_seq_length)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return [Encoded(ids, [0] + [1] * (len(ids) - 1)) for ids in pieces]


def show(tokenizer: Tokenizer, encoded: Encoded) -> Text:
    """The example's text. Control characters are shown, never sent, so that data cannot steer the terminal."""
    special = set(tokenizer.special_tokens.values())
    pairs = zip(encoded.ids, encoded.completion_mask, strict=True)
    text = Text()
    # a run of one kind is decoded as a whole: a character may be spread over several tokens
    for (learnt, is_special), run in groupby(pairs, key=lambda pair: (pair[1], pair[0] in special)):
        style = LEARNT if learnt else CONTEXT
        decoded = tokenizer.decode([token for token, _ in run])
        text.append(decoded.translate(VISIBLE), style=f"bold {style}" if is_special else style)
    if encoded.n_truncated:
        text.append(f" … {encoded.n_truncated} tokens cut", style="red")
    return text


def _encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    learn: Learn,
    add_generation_prompt: bool = False,
    learn_from: int = 0,
) -> tuple[list[int], list[int]]:
    """ids and mask of a whole conversation, with EOS where the last answer has no end token."""
    rendering = _locate(tokenizer, messages, add_generation_prompt)
    end_token, last = _end_token(tokenizer), len(messages) - 1
    learnt, edges = {}, {0, len(rendering.text)}
    last_is_open = False
    for i, (start, stop) in rendering.answers.items():
        end = end_token.match(rendering.text, stop)
        edges |= {start} if end else {start, stop}
        if (learn != "last" or i == last) and i >= learn_from:
            learnt[start] = end.end() if end else stop
        if i == last and not end and not add_generation_prompt:
            last_is_open = True
            edges = {edge for edge in edges if edge <= stop}

    ids: list[int] = []
    mask: list[int] = []
    for start, stop in pairwise(sorted(edges)):
        for token, offset in _tokenize(tokenizer, rendering, start, stop):
            ids.append(token)
            mask.append(int(learn == "everything" or offset < learnt.get(start, start)))
    if last_is_open:
        ids.append(_eos_id(tokenizer))
        mask.append(1)
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        ids, mask = ids[1:], mask[1:]
    return ids, mask


def _locate(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Rendering:
    """The rendering, once it is sure that no message can pass for a special token."""
    renderer = partial(render, template_of(tokenizer), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    rendering = locate(renderer, messages, _end_token(tokenizer), add_generation_prompt=add_generation_prompt)
    for i in rendering.unplaced:
        if found := _special(tokenizer).search(messages[i]["content"]):
            raise ValueError(
                f"message {i + 1} contains {found[0]!r}, the text of a special token, and the chat template rewrites "
                "the message, so that the two cannot be told apart"
            )
    return rendering


def _tokenize(tokenizer: Tokenizer, rendering: Rendering, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(id, the character it starts at) of text[start:stop], special tokens read outside the contents only."""
    pieces = [(start, stop, True)]
    template, inside = [], False
    for match in _special(tokenizer).finditer(rendering.text, start, stop):
        if _overlaps(match.span(), rendering.contents):
            inside = True
        else:
            template.append(match.span())
    if inside:
        pieces = _apart(template, start, stop)
    for first, last, parse_special in pieces:
        goes_on = _goes_on(tokenizer, rendering.text, first)
        encode = partial(_encode_on, tokenizer) if goes_on else tokenizer.encode_with_offsets
        ids, offsets = encode(rendering.text[first:last], parse_special=parse_special)
        for token, (offset, _) in zip(ids, offsets, strict=True):
            yield token, first + offset


def _goes_on(tokenizer: Tokenizer, text: str, start: int) -> bool:
    """Whether text[start:] must be encoded as the rest of a text, since the tokenizer puts a space before every text.

    SentencePiece's do, and after every special token too.
    """
    if start == 0 or _plain(tokenizer, "\nx")[-1:] == _plain(tokenizer, "x"):
        return False
    return not any(text.endswith(token, 0, start) for token in tokenizer.special_tokens)


def _encode_on(tokenizer: Tokenizer, text: str, *, parse_special: bool) -> tuple[list[int], list[Span]]:
    """encode_with_offsets without a space in front: what follows a newline, unless the newline joins it."""
    newline = _plain(tokenizer, "\n")
    ids, offsets = tokenizer.encode_with_offsets("\n" + text, parse_special=parse_special)
    if ids[: len(newline)] != newline:
        return tokenizer.encode_with_offsets(text, parse_special=parse_special)
    return ids[len(newline) :], [(start - 1, stop - 1) for start, stop in offsets[len(newline) :]]


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_with_offsets(text, parse_special=False)[0]


def _apart(special: list[Span], start: int, stop: int) -> list[tuple[int, int, bool]]:
    """Special tokens and the text between them as (start, stop, is it a special token)."""
    pieces, position = [], start
    for first, last in special:
        pieces += [(position, first, False), (first, last, True)]
        position = last
    return [*pieces, (position, stop, False)]


def _overlaps(span: Span, contents: list[Span]) -> bool:
    return any(span[0] < stop and start < span[1] for start, stop in contents)


def _special(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches any special token's text."""
    return any_of(tuple(tokenizer.special_tokens))


def _end_token(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches white space and an end token: an EOS, or the special token that the template writes after an answer."""
    eos = [token for token, number in tokenizer.special_tokens.items() if number in tokenizer.eos_ids]
    named = (tokenizer.eos_token, end_of_answer(tokenizer))
    return any_of((*eos, *filter(None, named)), before=r"\s*")


def _eos_id(tokenizer: Tokenizer) -> int:
    if not tokenizer.eos_ids:
        raise ValueError("the chat template ends no answer and the tokenizer has no EOS token: an answer could not end")
    return tokenizer.eos_ids[0]

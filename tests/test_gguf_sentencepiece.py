"""models/gguf_sentencepiece.py against SentencePiece's own rule (join the pair whose union scores best, the leftmost of
equals), written out by loops, on a vocabulary made here; spaces, bytes, special tokens; and what is refused."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chat import render, template_of
from data.encode import encode_messages, encode_prompt
from models import Tokenizer, load_tokenizer
from models.gguf_sentencepiece import merges_of

CORPUS = "the cat sat on the mat  and the rat sat on the hat, that is that. Đà Nẵng là thành phố đáng sống. 12 123 aaaa"
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TYPES = [2, 3, 3, 4, *[6] * 256]


@lru_cache
def vocabulary() -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Characters, then 60 unions of the most frequent neighbours in CORPUS; each scores below the one before it."""
    words = [list("▁" + word.replace(" ", "▁")) for word in CORPUS.split("  ")]
    pieces = list(dict.fromkeys(char for word in words for char in word))
    unions: list[str] = []
    for _ in range(60):
        pairs = Counter((word[i], word[i + 1]) for word in words for i in range(len(word) - 1))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        unions.append(left + right)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    tokens = [*SPECIAL, *BYTES, *dict.fromkeys(unions), *pieces]
    return tuple(tokens), tuple([0.0] * 260 + [-float(i) for i in range(len(tokens) - 260)])


def by_the_rule(text: str, prefix: bool = True) -> list[int]:
    """Ids of a text without special tokens, joining one pair at a time."""
    tokens, scores = vocabulary()
    id_of = {token: id for id, token in enumerate(tokens) if id >= 260}
    symbols = list((("▁" if prefix else "") + text.replace(" ", "▁")) if text else "")
    while True:
        unions = [(scores[id_of[a + b]], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in id_of]
        if not unions:
            break
        i = -max(unions)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = []
    for symbol in symbols:
        ids += [id_of[symbol]] if symbol in id_of else [4 + byte for byte in symbol.encode()]
    return ids


def write_gguf(path: Path, *, leave_out: tuple[str, ...] = (), **changes: Any) -> Path:
    tokens, scores = vocabulary()
    fields: dict[str, Any] = {
        "model": "llama",
        "tokens": list(tokens),
        "scores": list(scores),
        "token_type": [*TYPES, *[1] * (len(tokens) - 260)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (fields | changes).items():
        if key in leave_out:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("sp") / "t.gguf"))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("the catsmrd ,.Đàẵngáố123é👋\n\t▁"), max_size=40))
def test_ids_are_those_of_the_rule_and_give_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    assert ids == by_the_rule(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")  # the one character that stands for another


def test_real_words_and_every_offset(tokenizer: Tokenizer) -> None:
    for text in (CORPUS, "the cat", " the", "  the  cat ", "aaa aaaaa", "né 👋", "", "\n"):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == by_the_rule(text)
        assert {i for start, end in offsets for i in range(start, end)} == set(range(len(text)))
    assert len(tokenizer.encode(CORPUS)) < len(CORPUS) / 1.5


def test_a_text_after_a_special_token_starts_with_a_space_too(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("the[INST]the</s>cat") == [
        *by_the_rule("the"),
        3,
        *by_the_rule("the"),
        2,
        *by_the_rule("cat"),
    ]
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}


@pytest.mark.parametrize("template", ["vicuna", "chatgpt", "alpaca", "plain"])
@pytest.mark.parametrize("prefix", [True, False])
def test_an_answer_gets_no_space_that_the_whole_text_has_not(template: str, prefix: bool, tmp_path: Path) -> None:
    """The ids of a conversation are those of its text as one; those before its last answer are the prompt's."""
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", add_space_prefix=prefix)).with_chat_template(template)
    asked = [{"role": "user", "content": "the cat sat"}]
    messages = [*asked, {"role": "assistant", "content": "on the mat"}, {"role": "user", "content": "that"}]
    whole = [*messages, {"role": "assistant", "content": "is that."}]
    text = render(template_of(tokenizer), whole, bos_token="<s>", eos_token="</s>")
    example = encode_messages(tokenizer, whole, max_seq_length=10_000)
    ids = tokenizer.encode(text)
    assert example.ids[: len(ids)] == ids[: len(example.ids)]
    prompt = encode_prompt(tokenizer, messages)
    assert example.ids[: len(prompt)] == prompt
    learnt = [id for id, counts in zip(example.ids, example.completion_mask, strict=True) if counts]
    assert tokenizer.decode(learnt).split("</s>")[1].strip() == "is that."


def test_without_the_space_in_front(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", add_space_prefix=False))
    for text in ("the cat", " the", "né"):
        assert tokenizer.encode(text) == by_the_rule(text, prefix=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_a_file_that_says_nothing_means(tmp_path: Path) -> None:
    """BOS is expected, and the special ids are SentencePiece's own."""
    silent = ("bos_token_id", "eos_token_id", "unknown_token_id", "token_type")
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", leave_out=silent))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids) == ("<s>", "</s>", (2,))
    assert tokenizer.adds_bos
    assert not load_tokenizer(write_gguf(tmp_path / "t.gguf", add_bos_token=False)).adds_bos


def test_a_saved_tokenizer_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.adds_bos, again.bos_id, again.eos_ids) == (True, 1, (2,))
    for text in (CORPUS, "the[INST] né</s>"):
        assert again.encode_with_offsets(text) == tokenizer.encode_with_offsets(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leave_out": ("scores",)}, "tokenizer.ggml.scores must be a list of numbers, got NoneType"),
        ({"scores": [0.5]}, "tokenizer.ggml.scores has 1 entries for"),
        ({"scores": [float("nan")] * len(vocabulary()[0])}, "tokenizer.ggml.scores holds NaN or infinity"),
        ({"token_type": [2.5]}, "tokenizer.ggml.token_type must be a list of integers, got list"),
        ({"tokens": [*vocabulary()[0][:-1], "a" * 600]}, "has a token of 600 characters; at most 512"),
        ({"unknown_token_id": 10**6}, "unknown_token_id is 1000000, outside the"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_vocabulary_that_cannot_be_read_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_tokens_cost_no_more_than_the_lengths_there_are() -> None:
    """All cuts of 20,000 tokens of 500 characters would be ten million."""
    tokens = [f"{i:06d}" + "a" * 494 for i in range(20_000)]
    assert merges_of("here", tokens, [0.0] * len(tokens), [1] * len(tokens)) == []

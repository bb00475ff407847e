"""Tokenizers of GGUF files, each pre-tokenizer by its name and SentencePiece, against those that transformers makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from models import load_tokenizer
from tests import test_gguf_sentencepiece as sentencepiece
from tests import test_tokenizer as byte_level

TEXTS = [
    "It's 12:45 on 2024-05-17, ISN'T it? We'LL see; abcd ABab aBC",
    "Xin chào thế giới,\r\n\n  def f(x):\n\treturn x  # two  spaces  ",
    "Nguye\u0302\u0303n Va\u0306n A\u0301n",
    "العربية 日本語 x² ①② ٣",
    "a/b //c\n/",
]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "llama3", "llama-v3", "deepseek-r1-qwen", "tekken"])
def test_each_pre_tokenizer_gives_their_ids(pre: str, tmp_path: Path) -> None:
    """But for what a token as a whole is worth: their conversion knows no `ignore_merges`, so the texts avoid it."""
    byte_level.write_gguf(tmp_path / "t.gguf", pre=pre)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    ours = load_tokenizer(tmp_path / "t.gguf")
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


def test_qwen2_gives_the_ids_of_their_qwen2_tokenizer(tmp_path: Path) -> None:
    """Which composes text first. Their conversion of a GGUF file does not, nor llama.cpp: the model was not trained
    on what those make of combining marks."""
    byte_level.write_gguf(tmp_path / "t.gguf", pre="qwen2")
    theirs = Qwen2Tokenizer(
        vocab={token: id for id, token in enumerate(byte_level.TOKENS)},
        merges=[tuple(merge.split()) for merge in byte_level.MERGES],
    )
    ours = load_tokenizer(tmp_path / "t.gguf")
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


def test_sentencepiece_gives_their_ids(tmp_path: Path) -> None:
    """Of texts that start with no space: their conversion puts one in front of the others alone."""
    sentencepiece.write_gguf(tmp_path / "t.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    ours = load_tokenizer(tmp_path / "t.gguf")
    for text in (sentencepiece.CORPUS, "the cat", "né 👋\n12", "that  that   thetha", *TEXTS):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == text
    assert theirs("the").input_ids[:1] == [ours.bos_id]
    assert ours.adds_bos

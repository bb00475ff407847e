"""GGUF files of each family, and tokenizers of GGUF files (each pre-tokenizer by its name, and SentencePiece), against
what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from models import load_model, load_tokenizer
from tests import test_gguf_sentencepiece as sentencepiece
from tests import test_tokenizer as byte_level
from tests.small_llama import MISTRAL, QWEN2, QWEN3, assert_close, small_decoder, write_gguf


@torch.no_grad()
@pytest.mark.parametrize("family", [MISTRAL, QWEN2, QWEN3 | {"head_dim": 128}], ids=["mistral", "qwen2", "qwen3"])
def test_their_logits_of_a_file(family: dict[str, Any], tmp_path: Path) -> None:
    """Both libraries read one file: names, row order, biases, norms, epsilon. (Theirs takes 128 for the head size of a
    Qwen3, whatever the file says, and knows none with biases.)"""
    ours = small_decoder(**family, rms_norm_eps=1e-3)
    write_gguf(ours, tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ids = torch.randint(0, 96, (2, 30))
    assert_close(load_model(tmp_path / "m.gguf")(ids), theirs(ids).logits)


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

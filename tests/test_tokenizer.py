"""models/tokenizer.py and gguf_tokenizer.py: text survives to the byte, special tokens are read or kept as text, files
are read and written, and a vocabulary that cannot be read right is refused. transformers' own view: tests/peers."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Tokenizer, load_tokenizer

TEXTS = [
    "Xin chào thế giới, hôm nay trời đẹp quá nhỉ?",
    "Nguye\u0302\u0303n Va\u0306n A\u0301n",  # combining marks stay apart: nothing is composed
    "👩‍👩‍👧‍👦 🇻🇳 ☕️ 🤷🏽‍♀️ é é",
    "tabs\tand  spaces \r\n\n\n  end ",
    "12345 ٣٤ ①② 3.14",
    "\u0000\u200b\ufeff\U0010ffff",
    "",
]


@lru_cache
def smollm2() -> Tokenizer:
    return load_tokenizer("smollm2-135m")


@pytest.fixture
def tokenizer() -> Tokenizer:
    return smollm2()


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins, in the order of the bytes they stand for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


MERGES = ["1 2", "12 3", "a b", "ab c", "Ġ Ġ"]
TOKENS = ["<s>", "</s>", "<think>", *byte_alphabet(), *[merge.replace(" ", "") for merge in MERGES], "abcd"]
TYPES = [3, 3, 4, *[1] * (len(TOKENS) - 3)]


def write_gguf(path: Path, *, leave_out: tuple[str, ...] = (), **changes: Any) -> Path:
    """A GGUF file that holds a small byte-level vocabulary and no tensors."""
    fields: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": TYPES,
        "merges": MERGES,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (fields | changes).items():
        if key in leave_out:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[
            type(value)
        ]
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("parse_special", [True, False])
def test_text_survives_to_the_byte(text: str, parse_special: bool, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text, parse_special=parse_special)) == text


ABSENT = "\x04\x06\x13\x14\x16\x1d"  # no token of SmolLM2 holds these bytes, nor the first one of U+40000 … U+BFFFF


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters=ABSENT, max_codepoint=0x3FFFF)))
def test_any_text_survives_and_its_offsets_cover_it(text: str) -> None:
    tokenizer = smollm2()
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    covered = {i for start, end in offsets for i in range(start, end)}
    assert covered == set(range(len(text)))
    assert offsets == sorted(offsets)


def test_bytes_without_a_token_vanish(tokenizer: Tokenizer) -> None:
    """A property of SmolLM2's vocabulary, which the module's docstring tells: the same in transformers."""
    assert [char for char in map(chr, range(128)) if not tokenizer.encode(char)] == list(ABSENT)


def test_offsets_count_characters_not_bytes(tokenizer: Tokenizer) -> None:
    ids, offsets = tokenizer.encode_with_offsets("é 👋 a")
    assert offsets[-1] == (3, 5)
    assert [id for id, span in zip(ids, offsets, strict=True) if span == (3, 5)] == tokenizer.encode(" a")
    assert {start for start, _ in offsets} <= {0, 1, 2, 3}


def test_special_tokens_are_read_or_kept_as_text(tokenizer: Tokenizer) -> None:
    text = "a<|im_end|>b"
    assert 2 in tokenizer.encode(text)
    assert 2 not in tokenizer.encode(text, parse_special=False)
    assert 2 in tokenizer.encode(text)  # one call leaves no trace in the next
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "ab"
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False), skip_special_tokens=True) == text


def test_what_smollm2_says_about_itself(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_token, tokenizer.bos_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_ids, tokenizer.pad_id) == ("<|im_end|>", (2,), 2)
    assert (tokenizer.vocab_size, len(tokenizer.special_tokens), tokenizer.adds_bos) == (49152, 17, False)
    assert tokenizer.special_tokens["<|im_end|>"] == 2


def test_a_conversation_is_rendered_and_encoded_once(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hé <|im_end|>"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHé <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encode(text)


def test_a_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    for changes in ({"pre": "llama-bpe", "padding_token_id": 1}, {"pre": "gpt-2"}, {"add_bos_token": True}):
        first = load_tokenizer(write_gguf(tmp_path / "t.gguf", eot_token_id=2, **changes))
        folder = tmp_path / str(changes)
        folder.mkdir()
        first.save(folder)
        again = load_tokenizer(folder)
        for name in ("bos_token", "eos_token", "bos_id", "eos_ids", "pad_id", "adds_bos", "special_tokens"):
            assert getattr(again, name) == getattr(first, name), name
        assert again.chat_template is None
        for text in ["a <think></s>  123 abcd", *TEXTS]:
            assert again.encode_with_offsets(text) == first.encode_with_offsets(text)


def test_the_template_keeps_every_byte_when_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_bytes().decode() == tokenizer.chat_template
    template = "{{ messages[0]['content'] }}\r\n  \n"
    (tmp_path / "chat_template.jinja").write_bytes(template.encode())
    again = load_tokenizer(tmp_path)
    assert again.chat_template == template


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "  123abcd", ["Ġ", "Ġ", "123", "abc", "d"]),
        ("smollm", "  123abcd", ["ĠĠ", "1", "2", "3", "abc", "d"]),
        ("llama-bpe", "  1234abcd", ["Ġ", "Ġ", "123", "4", "abcd"]),
        ("llama-bpe", "abcde", ["abc", "d", "e"]),
        ("llama3", "1234abcd", ["123", "4", "abcd"]),
        ("llama-v3", "abcd", ["abcd"]),
        ("qwen2", "  123abcd", ["Ġ", "Ġ", "1", "2", "3", "abc", "d"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),
        ("deepseek-r1-qwen", "12 e\u0301", ["1", "2", "Ġ", "e", "Ì", "ģ"]),
        ("tekken", "12abcd aBab", ["1", "2", "abcd", "Ġ", "a", "B", "ab"]),
        ("tekken", "aaBabC", ["a", "a", "B", "ab", "C"]),
    ],
)
def test_each_pre_tokenizer_cuts_as_its_name_says(pre: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    """gpt-2: spaces but the last one, then ` 123` together; smollm: digits first; llama-bpe: up to three digits, and a
    piece that is a token (abcd, which no merge reaches) is taken whole; qwen2: digits alone, e and its accent composed;
    tekken: digits alone, words end where a capital follows."""
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", pre=pre))
    assert tokenizer.encode(text) == [TOKENS.index(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("pre", "said", "adds"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_expected_but_never_added(pre: str, said: bool | None, adds: bool, tmp_path: Path) -> None:
    changes = {} if said is None else {"add_bos_token": said}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", pre=pre, **changes))
    assert tokenizer.adds_bos == adds
    assert tokenizer.encode("a") == [TOKENS.index("a")]


def test_control_and_user_defined_tokens_are_matched_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf"))
    assert tokenizer.encode("<think></s>") == [2, 1]
    assert tokenizer.special_tokens == {"<s>": 0, "</s>": 1}


def folder_files(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    """A tokenizer folder with a small tokenizer.json and the given other files."""
    source = load_tokenizer(write_gguf(folder / "t.gguf"))
    source.save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_in_the_spellings_that_are_around(tmp_path: Path) -> None:
    """Tokens as objects, tokens only in special_tokens_map, named templates, several ids that end a turn, settings
    for truncation and padding left in tokenizer.json."""
    config = {
        "eos_token": {"content": "</s>", "lstrip": False},
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}],
    }
    folder = folder_files(
        tmp_path, config, special_tokens_map={"bos_token": "<s>"}, generation_config={"eos_token_id": [1, 2]}
    )
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids) == ("<s>", "</s>", (1, 2))
    assert (tokenizer.pad_id, tokenizer.chat_template) == (1, "yes")
    assert len(tokenizer.encode("a b c d")) == 7


def test_a_tokenizer_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_files(tmp_path, {}))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.adds_bos) == (None, (), 0, False)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}]) == tokenizer.encode("a\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer model 't5' is not supported; supported in GGUF: gpt2, llama"),
        ({"pre": "falcon"}, "pre-tokenizer 'falcon' is not supported; supported in GGUF: gpt-2, smollm, llama-bpe"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "tokenizer.ggml.tokens has 'a' 2 times"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be true or false, got 1"),
        ({"eot_token_id": 2**31}, "eot_token_id is 2147483648, outside the 265 tokens"),
        ({"leave_out": ("pre",)}, "pre-tokenizer None is not supported"),
        ({"leave_out": ("tokens",)}, "tokenizer.ggml.tokens must be a list of strings, got NoneType"),
        ({"merges": [1, 2]}, "tokenizer.ggml.merges must be a list of strings, got list"),
        ({"eos_token_id": 9999}, "eos_token_id is 9999, outside the 265 tokens"),
        ({"token_type": [1, 1]}, "token_type has 2 entries for 265 tokens"),
        ({"merges": ["no such"]}, "the tokenizers library cannot read this tokenizer"),
    ],
    ids=str,
)
def test_a_gguf_vocabulary_that_cannot_be_read_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "t.gguf", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"eos_token": "<nowhere>"}, {}, "eos_token is '<nowhere>', which the vocabulary lacks"),
        ({"eos_token": 2}, {}, "eos_token must be text, got 2"),
        ({"chat_template": 7}, {}, "chat_template must be text, got int"),
        ({}, {"generation_config": {"eos_token_id": "2"}}, "eos_token_id must be an id or a list of ids, got '2'"),
        ({}, {"tokenizer": {"version": "1.0"}}, "the tokenizers library cannot read this tokenizer"),
        ({}, {"tokenizer": []}, "tokenizer.json: expected a JSON object, found list"),
    ],
    ids=str,
)
def test_a_folder_that_cannot_be_read_is_refused(
    config: dict[str, Any], files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(folder_files(tmp_path, config, **files))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)

"""A GGUF file's tokenizer, rebuilt as Hugging Face's tokenizer.json. `tokenizer.ggml.model` names its kind.

    gpt2     byte-level BPE, merges and all. Text is cut into pieces, and BPE never merges across a cut; how to cut is
             not stored but named in `tokenizer.ggml.pre`
    llama    SentencePiece's BPE, without merges: gguf_sentencepiece.py

The wrong cut gives ids that the model never saw, without any error, so a name that is not in PRE_TOKENIZERS is refused.

    gpt-2                         words with their leading space, digits, other characters, spaces
    smollm                        every digit alone first, then as gpt-2
    llama-bpe, llama3, llama-v3   Llama 3's: digits by three; a piece that is a token as a whole needs no merges
    qwen2                         the same with every digit alone; text is composed (NFC) first
    deepseek-r1-qwen              the same, and text stays as it is
    tekken                        Mistral's: words are cut where lower case turns to upper case

A family that comes later adds its name here. Left out: unigram and WordPiece vocabularies.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

from .gguf_format import GGUFHeader
from .gguf_sentencepiece import sentencepiece_json

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _split(pattern: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ]


class PreTokenizer(NamedTuple):
    pieces: list[dict[str, Any]]
    """tokenizer.json's pre-tokenizers, one after another"""
    whole: bool = False
    """a piece that is a token is taken whole, and the model expects BOS"""
    composed: bool = False
    """text is normalized to NFC first"""


GPT2: list[dict[str, Any]] = [BYTE_LEVEL | {"use_regex": True}]
LLAMA3 = _split(rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}")
QWEN2 = _split(rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}")
TEKKEN = _split(
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(GPT2),
    "smollm": PreTokenizer([{"type": "Digits", "individual_digits": True}, *GPT2]),
    "llama-bpe": PreTokenizer(LLAMA3, whole=True),
    "llama3": PreTokenizer(LLAMA3, whole=True),
    "llama-v3": PreTokenizer(LLAMA3, whole=True),
    "qwen2": PreTokenizer(QWEN2, composed=True),
    "deepseek-r1-qwen": PreTokenizer(QWEN2),
    "tekken": PreTokenizer(TEKKEN, whole=True),
}
MODELS = ("gpt2", "llama")
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # where a `llama` file names none
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type


def gguf_tokenizer_files(header: GGUFHeader) -> dict[str, Any]:
    """tokenizer, config, chat_template and eos_ids of a TokenizerFiles.

    Raises ValueError when the file has no vocabulary, a damaged one, or one of another kind.
    """
    data, where = header.metadata, str(header.path)
    tokens = _list(header, "tokens", str)
    model, pre = data.get("tokenizer.ggml.model"), data.get("tokenizer.ggml.pre")
    if model not in MODELS:
        raise ValueError(f"{where}: tokenizer model {model!r} is not supported; supported in GGUF: {', '.join(MODELS)}")
    for token, times in Counter(tokens).most_common(1):
        if times > 1:
            raise ValueError(f"{where}: tokenizer.ggml.tokens has {token[:40]!r} {times} times")
    types = _list(header, "token_type", int, [1] * len(tokens), len(tokens))
    config: dict[str, Any] = {key: _token(header, tokens, name) for key, name in SPECIAL.items()}
    if model == "gpt2":
        tokenizer, adds_bos = _byte_level_json(header, tokens, pre)
    else:
        scores = _list(header, "scores", float, None, len(tokens))
        prefix = _flag(header, "add_space_prefix", True)
        tokenizer, adds_bos = sentencepiece_json(where, tokens, scores, types, config["unk_token"], prefix), True
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["add_bos_token"] = _flag(header, "add_bos_token", adds_bos)
    config["clean_up_tokenization_spaces"] = False
    template = data.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{where}: tokenizer.chat_template must be text, got {type(template).__name__}")
    tokenizer["added_tokens"] = _added(tokens, types)
    tokenizer["post_processor"] = (
        _bos_first(tokens, config) if config["add_bos_token"] and config["bos_token"] else None
    )
    ends = [_token(header, tokens, name) for name in ("eos", "eot", "eom")]
    return {
        "tokenizer": tokenizer,
        "config": config,
        "chat_template": template,
        "eos_ids": tuple(tokens.index(token) for token in ends if token is not None),
    }


def _byte_level_json(header: GGUFHeader, tokens: list[str], pre: Any) -> tuple[dict[str, Any], bool]:
    """(tokenizer.json without added tokens and post-processor, whether such models expect BOS)."""
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"{header.path}: pre-tokenizer {pre!r} is not supported; supported in GGUF: {known}")
    kind = PRE_TOKENIZERS[pre]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "NFC"} if kind.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": kind.pieces},
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind.whole,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in _list(header, "merges", str)],
        },
    }
    return content, kind.whole


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """The tokens that are matched whole, before anything is cut."""
    return [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _bos_first(tokens: list[str], config: dict[str, Any]) -> dict[str, Any]:
    """The post-processor that puts BOS before a text."""
    bos = config["bos_token"]
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
    }


def _list(
    header: GGUFHeader, key: str, kind: type, default: list[Any] | None = None, length: int | None = None
) -> list[Any]:
    """A list of the metadata, of one kind, and of the length of the vocabulary."""
    value = header.metadata.get(f"tokenizer.ggml.{key}", default)
    name = {str: "strings", int: "integers", float: "numbers"}[kind]
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ValueError(f"{header.path}: tokenizer.ggml.{key} must be a list of {name}, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise ValueError(f"{header.path}: tokenizer.ggml.{key} has {len(value)} entries for {length} tokens")
    if kind is float and not all(map(math.isfinite, value)):
        raise ValueError(f"{header.path}: tokenizer.ggml.{key} holds NaN or infinity")
    return value


def _flag(header: GGUFHeader, key: str, default: bool) -> bool:
    value = header.metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise ValueError(f"{header.path}: tokenizer.ggml.{key} must be true or false, got {value!r}")
    return value


def _token(header: GGUFHeader, tokens: list[str], name: str) -> str | None:
    """The text of a special token, by its id in the metadata."""
    is_sentencepiece = header.metadata.get("tokenizer.ggml.model") == "llama"
    default = SENTENCEPIECE_IDS.get(name) if is_sentencepiece else None
    id = header.metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    if id is None:
        return None
    if not isinstance(id, int) or not 0 <= id < len(tokens):
        shown = str(id)[:40]
        raise ValueError(f"{header.path}: tokenizer.ggml.{name}_token_id is {shown}, outside the {len(tokens)} tokens")
    return tokens[id]

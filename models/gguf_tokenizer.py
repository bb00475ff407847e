"""A GGUF file's tokenizer, rebuilt as Hugging Face's tokenizer.json: byte-level BPE, `tokenizer.ggml.model` gpt2.

Text is cut into pieces, and BPE never merges across a cut; how to cut is not stored but named in
`tokenizer.ggml.pre`. The wrong cut gives ids that the model never saw, without any error, so a name that is not in
PRE_TOKENIZERS is refused.

    gpt-2       words with their leading space, digits, other characters, spaces
    smollm      every digit alone first, then as gpt-2
    llama-bpe   Llama 3's; a piece that is a token as a whole needs no merges

A family that comes later adds its name here. Left out: sentencepiece (`llama`), unigram and WordPiece vocabularies.
"""

from typing import Any

from .gguf_format import GGUFHeader

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2: list[dict[str, Any]] = [BYTE_LEVEL | {"use_regex": True}]
SMOLLM = [{"type": "Digits", "individual_digits": True}, *GPT2]
LLAMA3: list[dict[str, Any]] = [
    {"type": "Split", "pattern": {"Regex": LLAMA3_PIECES}, "behavior": "Isolated", "invert": False},
    BYTE_LEVEL | {"use_regex": False},
]
PRE_TOKENIZERS = {"gpt-2": GPT2, "smollm": SMOLLM, "llama-bpe": LLAMA3}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def gguf_tokenizer_files(header: GGUFHeader) -> dict[str, Any]:
    """tokenizer, config, chat_template and eos_ids of a TokenizerFiles.

    Raises ValueError when the file has no vocabulary, or one of another kind.
    """
    data, where = header.metadata, str(header.path)
    tokens = _strings(header, "tokens")
    merges = _strings(header, "merges")
    model, pre = data.get("tokenizer.ggml.model"), data.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise ValueError(f"{where}: tokenizer model {model!r} is not supported; supported in GGUF: gpt2")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"{where}: pre-tokenizer {pre!r} is not supported; supported in GGUF: {known}")
    types = data.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    config: dict[str, Any] = {key: _token(header, tokens, name) for key, name in SPECIAL.items()}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["add_bos_token"] = bool(data.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"))
    config["clean_up_tokenization_spaces"] = False
    eos_ids = [data.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "tokenizer": _tokenizer_json(tokens, merges, types, pre, config),
        "config": config,
        "chat_template": data.get("tokenizer.chat_template"),
        "eos_ids": tuple(id for id in eos_ids if id is not None),
    }


def _tokenizer_json(
    tokens: list[str], merges: list[str], types: list[int], pre: str, config: dict[str, Any]
) -> dict[str, Any]:
    added = [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": _bos_first(tokens, config) if config["add_bos_token"] and config["bos_token"] else None,
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


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


def _strings(header: GGUFHeader, key: str) -> list[str]:
    value = header.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{header.path}: tokenizer.ggml.{key} must be a list of strings, got {type(value).__name__}")
    return value


def _token(header: GGUFHeader, tokens: list[str], name: str) -> str | None:
    """The text of a special token, by its id in the metadata."""
    id = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if id is None:
        return None
    if not isinstance(id, int) or not 0 <= id < len(tokens):
        raise ValueError(f"{header.path}: tokenizer.ggml.{name}_token_id is {id!r}, outside the {len(tokens)} tokens")
    return tokens[id]

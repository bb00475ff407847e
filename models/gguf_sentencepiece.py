"""A SentencePiece BPE vocabulary, as GGUF stores it (`tokenizer.ggml.model` llama), rebuilt as tokenizer.json.

It has tokens and scores, and no merges: of all neighbours whose union is a token, those with the highest score are
joined, the leftmost of equals, until none is left. Hugging Face's BPE takes a list of pairs in order instead, so here
every way of cutting a token in two tokens becomes a pair, in the order of the joined token's score.

    " " is written ▁; a text gets one in front (add_space_prefix), and so does every text after a special token, which
    is llama.cpp's rule; what no token covers is spelled in bytes, <0x00> … <0xFF>

Left out: SentencePiece's own normalization of text (Llama's and Mistral's have none).
"""

from typing import Any

NORMAL = 1  # tokenizer.ggml.token_type
LONGEST = 512  # characters of a token that text can become: real ones have 16, or 64 where they are spaces
SPACE = "▁"


def sentencepiece_json(
    where: str, tokens: list[str], scores: list[float], types: list[int], unk_token: str | None, prefix: bool
) -> dict[str, Any]:
    """tokenizer.json without added tokens and post-processor. Raises ValueError for a token that is too long."""
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    text = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, *spaces] if prefix else spaces,
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*text, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else text,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk_token,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": merges_of(where, tokens, scores, types),
        },
    }


def merges_of(where: str, tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best first."""
    score_of = {token: s for token, s, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    lengths = sorted({len(token) for token in score_of})
    if lengths and lengths[-1] > LONGEST:
        raise ValueError(f"{where}: tokenizer.ggml.tokens has a token of {lengths[-1]} characters; at most {LONGEST}")
    pairs = [
        (-score, token[:n], token[n:])
        for token, score in score_of.items()
        for n in lengths
        if n < len(token) and token[:n] in score_of and token[n:] in score_of
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]

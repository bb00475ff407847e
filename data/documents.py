"""Plain text becomes pieces of token ids, for continued pre-training.

    document      [BOS] t₁ t₂ … tₙ [EOS]         BOS where the tokenizer expects one, EOS where it has one
    pieces        T tokens each, and every piece after the first begins with the last token of the piece before
    T = 4         BOS t₁ t₂ t₃ │ t₃ t₄ t₅ t₆ │ t₆ EOS

The token that stands twice is context the second time: a first token has nothing before it, so it is not predicted.
With it, every token but a document's very first is predicted exactly once, and none is lost.

Text is text: "<|endoftext|>" in a document is tokenized as the characters it is made of.
"""

from .chat import Tokenizer

MAX_DOCUMENT_CHARS = 2**26


def document_pieces(tokenizer: Tokenizer, text: str, max_seq_length: int) -> list[list[int]]:
    """A document's pieces, each of at most max_seq_length ids; none for a blank document.

    Raises ValueError for max_seq_length below 2 and for more than MAX_DOCUMENT_CHARS characters.
    """
    if max_seq_length < 2:
        raise ValueError(f"max_seq_length must be at least 2 for plain text, got {max_seq_length}")
    if len(text) > MAX_DOCUMENT_CHARS:
        raise ValueError(
            f"a document of {len(text):,} characters is tokenized at once, at most {MAX_DOCUMENT_CHARS:,}; split it"
        )
    if not text.strip():
        return []
    ids, _ = tokenizer.encode_with_offsets(text, parse_special=False)
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    ids = [*ids, *tokenizer.eos_ids[:1]]
    step = max_seq_length - 1
    return [ids[start : start + max_seq_length] for start in range(0, max(1, len(ids) - 1), step)]

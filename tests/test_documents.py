"""data/documents.py: plain text is cut into pieces; every token but the first is predicted once, and none is lost."""

from itertools import pairwise

import pytest

from data import documents, encode_dataset
from data.documents import document_pieces
from data.schema import Schema
from tests.toy_tokenizer import ToyTokenizer

TEXT = "The quick brown fox. Xin chào thế giới 🙂\n\n  <|im_end|> is text here.\n"
TEXT_ROWS = Schema("text", "text")


def joined(pieces: list[list[int]]) -> list[int]:
    """The document's ids: the first token of each later piece stood at the end of the piece before."""
    assert all(later[0] == before[-1] for before, later in pairwise(pieces))
    return pieces[0] + [token for piece in pieces[1:] for token in piece[1:]]


@pytest.mark.parametrize("length", [2, 3, 7, 10, 1000])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_the_pieces_are_the_document(length: int, bos: bool, eos: bool) -> None:
    tokenizer = ToyTokenizer(bos_token="<s>" if bos else None, eos_token="</s>" if eos else None, adds_bos=bos)
    ids = tokenizer.encode(TEXT, parse_special=False)
    assert tokenizer.special_tokens["<|im_end|>"] not in ids
    pieces = document_pieces(tokenizer, TEXT, length)
    whole = [tokenizer.special_tokens["<s>"]] * bos + ids + [tokenizer.special_tokens["</s>"]] * eos
    assert joined(pieces) == whole
    assert all(len(piece) == length for piece in pieces[:-1])
    assert 2 <= len(pieces[-1]) <= length
    assert len(pieces) == max(1, -(-(len(whole) - 1) // (length - 1)))


def test_a_bos_that_the_model_does_not_expect_is_not_put() -> None:
    tokenizer = ToyTokenizer(bos_token="<s>", adds_bos=False)
    assert document_pieces(tokenizer, "fox", 100)[0][0] != tokenizer.bos_id


def test_every_token_is_learnt_once_over_the_pieces() -> None:
    tokenizer = ToyTokenizer()
    rows = [{"text": TEXT}, {"text": " \n"}, {"text": ""}, {"text": "x"}, {"text": TEXT * 3}]
    dataset = encode_dataset(tokenizer, rows, TEXT_ROWS, max_seq_length=16, path="a.txt")
    n_tokens = sum(len(tokenizer.encode(row["text"], parse_special=False)) + 1 for row in rows if row["text"].strip())
    report = dataset.report
    assert report.learnt_tokens == n_tokens - 3  # one first token for each document
    assert (report.rows, report.dropped, report.truncated, report.longest) == (5, 2, 0, 16)
    assert report.examples == len(dataset.examples)
    assert f"{report.examples} examples" in str(report)
    assert sorted(set(dataset.row_indices)) == [0, 3, 4]
    assert all(example.completion_mask == [0] + [1] * (len(example.ids) - 1) for example in dataset.examples)


def test_what_cannot_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ToyTokenizer()
    with pytest.raises(ValueError, match=r"^a.txt: row 1: max_seq_length must be at least 2 for plain text, got 1$"):
        encode_dataset(tokenizer, [{"text": "a"}], TEXT_ROWS, max_seq_length=1, path="a.txt")
    with pytest.raises(ValueError, match=r"^a.txt: nothing to learn: none of 1 rows has a token"):
        encode_dataset(tokenizer, [{"text": " "}], TEXT_ROWS, max_seq_length=8, path="a.txt")
    monkeypatch.setattr(documents, "MAX_DOCUMENT_CHARS", 10)
    with pytest.raises(ValueError, match=r"^a.txt: row 2: a document of 11 characters .*, at most 10; split it$"):
        encode_dataset(tokenizer, [{"text": "x" * 10}, {"text": "x" * 11}], TEXT_ROWS, max_seq_length=8, path="a.txt")

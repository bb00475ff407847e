"""data/preference.py: rows become pairs with one prompt; what is left out is counted, what is bad is named."""

import json
import re
from pathlib import Path

import pytest

import qlora
from data import DataFlags, detect, encode_prompt, read_datasets, to_messages
from data.encode import encode_messages
from data.preference import EncodedPair, Pair, encode_pair, encode_pairs, to_pair
from models import load_tokenizer
from tests.small_base import write_base, write_rows
from tests.toy_tokenizer import ToyTokenizer

USER = {"role": "user", "content": "2+2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "Adding is fun!"}
SYSTEM = {"role": "system", "content": "Be short."}
HUMAN, GPT = {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}
AGAIN = [USER, GOOD, {"role": "user", "content": "And 3+3?"}]


def pair_of(row: dict) -> Pair:
    return to_pair(row, detect([row], "pairs.jsonl"), "pairs.jsonl: row 1")


def encoded(rows: list[dict], length: int = 200):
    return encode_pairs(ToyTokenizer(), rows, detect(rows, "pairs.jsonl"), max_seq_length=length, path="pairs.jsonl")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": BAD["content"]}, [USER]),
        ({"prompt": [USER], "chosen": GOOD, "rejected": [BAD]}, [USER]),
        ({"prompt": [SYSTEM, HUMAN], "chosen": [GPT], "rejected": BAD}, None),
        ({"prompt": [HUMAN], "chosen": GPT, "rejected": [BAD]}, [USER]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"chosen": [HUMAN, GPT], "rejected": [USER, BAD]}, [USER]),
        ({"chosen": [SYSTEM, *AGAIN, GOOD], "rejected": [SYSTEM, *AGAIN, BAD]}, [SYSTEM, *AGAIN]),
        ({"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [SYSTEM, USER]),
        ({"prompt": AGAIN, "chosen": "4", "rejected": [BAD]}, AGAIN),
        ({"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    ],
)
def test_shapes(row: dict, prompt: list[dict] | None) -> None:
    if prompt is None:  # one list is of one kind
        with pytest.raises(ValueError, match=r"^pairs.jsonl: row 1: message 2: missing 'role'"):
            pair_of(row)
    else:
        assert pair_of(row) == (prompt, [GOOD], [BAD])


def test_conversations_that_part_early_are_answers_of_several_messages() -> None:
    tails = [[GOOD, USER, GOOD], [BAD, USER, GOOD]]
    pair = pair_of({"chosen": [USER, *tails[0]], "rejected": [USER, *tails[1]]})
    assert pair == ([USER], *tails)


def test_the_three_rows_in_the_docs_are_one_pair() -> None:
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    table = page.partition("| prompt | chosen | rejected |\n|---|---|---|\n")[2].partition("\n\n")[0]
    rows = [[re.sub(r"^`|`$", "", cell) for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]
    assert len(rows) == 3
    for cells in rows:
        values = {name: json.loads(cell) for name, cell in zip(("prompt", "chosen", "rejected"), cells, strict=True)
                  if cell != "(none)"}  # fmt: skip
        assert pair_of(values) == ([USER], [GOOD], [BAD])


ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "chosen": " \n"}, r"chosen: the answer \(message 2\) is empty"),
        ({**ROW, "rejected": ""}, r"rejected: the answer \(message 2\) is empty"),
        ({**ROW, "prompt": ""}, r"chosen: the question \(message 1\) is empty"),
        ({**ROW, "chosen": 7}, "'chosen' must be a list with messages in it, found a number"),
        ({**ROW, "rejected": []}, "'rejected' must be a list with messages in it, found an empty list"),
        ({**ROW, "rejected": None}, "'rejected' must be a list with messages in it, found null"),
        ({"chosen": "b", "rejected": "c"}, "missing 'prompt': chosen and rejected are answers alone"),
        ({"prompt": "a", "chosen": "b"}, "missing 'rejected'; found chosen, prompt"),
        ({**ROW, "prompt": [GOOD]}, "chosen: message 1 must be from user, found assistant"),
        (
            {**ROW, "chosen": [USER, GOOD]},
            "chosen and rejected must be the same up to .*; message 1 of chosen is .*user",
        ),
        (
            {"chosen": [*AGAIN, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            "chosen and rejected must be the same up to an answer; message 3 of chosen is from user",
        ),
        ({"chosen": [USER], "rejected": [USER]}, ".*message 1 of chosen is from user"),
    ],
)
def test_bad_rows(row: dict, message: str) -> None:
    schema = detect([ROW], "pairs.jsonl")
    with pytest.raises(ValueError, match=f"^pairs.jsonl: row 3: {message}$"):
        to_pair(row, schema, "pairs.jsonl: row 3")


def check_pieces(tokenizer, pair: Pair, found: EncodedPair) -> None:
    """The prompt is what generation starts from; the masks mark the answers and their end tokens, no more."""
    start = encode_prompt(tokenizer, pair.prompt)
    assert found.prompt_length == len(start)
    for side, answer in ((found.chosen, pair.chosen), (found.rejected, pair.rejected)):
        whole = encode_messages(tokenizer, [*pair.prompt, *answer], max_seq_length=999)
        assert side.ids == whole.ids
        assert side.ids[: len(start)] == start
        assert side.completion_mask == [0] * len(start) + whole.completion_mask[len(start) :]
        learnt = [token for token, m in zip(side.ids, side.completion_mask, strict=True) if m]
        assert tokenizer.decode(learnt) == "<|im_end|>".join([*(m["content"] for m in answer[::2]), ""])


@pytest.mark.parametrize("builtin", [False, True], ids=["toy", "smollm2"])
def test_prompt_and_answers_are_tokenized_by_pieces(builtin: bool) -> None:
    """Also where a token would reach across the border: an answer that begins with a newline."""
    tokenizer = load_tokenizer("smollm2-135m") if builtin else ToyTokenizer()
    newline = [{"role": "assistant", "content": "\n\n4"}]
    for pair in (Pair([USER], [GOOD], [BAD]), Pair(AGAIN, newline, [BAD]), Pair([USER], [GOOD, USER, BAD], [BAD])):
        check_pieces(tokenizer, pair, encode_pair(tokenizer, pair, max_seq_length=200))


def test_a_template_that_writes_two_prompts_is_refused() -> None:
    """One that begins with the number of messages, say, where the answers have not equally many."""
    tokenizer = ToyTokenizer("{{ messages | length }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    row = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]}
    with pytest.raises(
        ValueError, match=r"^p: row 1: the chat template writes the prompt before chosen otherwise than"
    ):
        encode_pairs(tokenizer, [row], detect([row], "p"), max_seq_length=99, path="p")


def test_ties_and_what_is_cut_are_counted() -> None:
    """Of equal answers, and of answers that a cut makes equal, nothing is learnt; nor of one that is cut away."""
    long = "one two three four five six seven"
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": f"{long} eight", "rejected": f"{long} nine"},
        {"prompt": long * 3, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": long * 3},
    ]
    start = len(encode_prompt(ToyTokenizer(), [{"role": "user", "content": "a"}]))
    dataset = encoded(rows, length=start + 6)
    report = dataset.report
    assert dataset.row_indices == [0, 4]
    assert (report.rows, report.pairs, report.ties, report.truncated, report.dropped) == (5, 2, 2, 3, 1)
    assert report.longest == start + 6
    assert report.tokens == sum(len(p.chosen.ids) + len(p.rejected.ids) for p in dataset.pairs)
    assert report.chosen_tokens == 2 * 2, "b and its end token"
    assert report.rejected_tokens == 2 + 6
    said = str(report)
    assert said.startswith("2 pairs, ")
    assert "(an answer on average: chosen 2.0, rejected 4.0)" in said
    assert said.endswith("3 cut at the end, 2 ties left out, 1 dropped")
    with pytest.raises(ValueError, match=r"nothing to learn: of 2 rows 1 are ties, and 1 have an answer .* beyond"):
        encoded([rows[1], rows[3]], length=start + 6)


def flags_of(tmp_path: Path, rows: list[dict], **more) -> DataFlags:
    return DataFlags(data=str(write_rows(tmp_path / "pairs.jsonl", rows)), shape="preference", **more)


def test_pairs_are_held_out_and_get_a_system_message(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(8)]
    training, held_out = read_datasets(flags_of(tmp_path, rows, eval_fraction=0.25, system="Be short."))
    assert (len(training.rows), len(held_out.rows)) == (6, 2)
    pairs = [to_pair(row, part.schema, "row") for part in (training, held_out) for row in part.rows]
    assert {pair.prompt[1]["content"] for pair in pairs} == {str(i) for i in range(8)}
    assert all(pair.prompt[0] == SYSTEM and pair.chosen == [{**GOOD, "content": "b"}] for pair in pairs)
    with pytest.raises(ValueError, match=r"^--turns: pairs have no turns$"):
        read_datasets(flags_of(tmp_path, rows, turns=2))
    with pytest.raises(ValueError, match=r"pairs.jsonl: row 2: rejected: the answer .* is empty"):
        read_datasets(flags_of(tmp_path, [ROW, {**ROW, "rejected": ""}], eval_fraction=0.5))


def test_supervised_commands_say_where_pairs_belong() -> None:
    schema = detect([ROW], "pairs.jsonl")
    assert schema.kind == "preference"
    with pytest.raises(ValueError, match=r"^row 1: a pair of answers is for qlora dpo and orpo; .*--completion-column"):
        to_messages(ROW, schema, "row 1")


def test_inspect_data_shows_a_pair(tmp_path: Path, capsys) -> None:
    base = write_base(tmp_path / "base")
    data = write_rows(tmp_path / "pairs.jsonl", [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ROW])
    assert qlora.main(["inspect", "data", "--data", str(data), "--model", str(base), "--rows", "1"]) == 0
    lines = capsys.readouterr().out
    assert "2 pairs, " in lines
    assert re.search(r"row 1: a prompt of \d+ tokens, chosen 2, rejected \d+", lines)
    shown = lines.partition("row 1")[2]
    assert shown.count("2+2?") == 1, "the prompt stands once"
    assert shown.index("2+2?") < shown.index("4<|im_end|>") < shown.index("Adding is fun!<|im_end|>")

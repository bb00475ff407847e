"""data/flags.py and data/dataset.py: flags tell the shape, hold rows out, merge turns; the sentence says all of it."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from commands.inspect_data import InspectDataArgs
from commands.probe import ProbeArgs
from data import DataFlags, Dataset, read_datasets, to_messages
from data.schema import SHAPES, to_text
from data.sources import ENDINGS
from data.template import fill, parse_question_and_answer
from trainers.sft import SFTConfig

# the shape of GSM8K's rows
MATH = [
    {"question": "Mai has 3 pens and buys 4. How many has she?", "answer": "3+4 = <<3+4=7>>7 pens.\n#### 7"},
    {"question": "A pen costs $2. What do 5 cost?", "answer": "5*2 = $<<5*2=10>>10.\n#### 10"},
    {"question": "Half of 8?", "answer": "8/2 = <<8/2=4>>4\n#### 4"},
]
NESTED = [{"data": {"q": f"q{i}", "a": [f"a{i}"]}, "split": "dev" if i % 4 == 0 else "train"} for i in range(12)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def conversations(dataset: Dataset) -> list[list[tuple[str, str]]]:
    return [
        [(message["role"], message["content"]) for message in to_messages(row, dataset.schema, "row")]
        for row in dataset.rows
    ]


def one_turn(question: str, answer: str) -> list[tuple[str, str]]:
    return [("user", question), ("assistant", answer)]


def test_all_commands_read_data_by_the_same_flags() -> None:
    wanted = {field.name: (field.default, field.type) for field in fields(DataFlags)}
    for arguments in (SFTConfig, ProbeArgs, InspectDataArgs):
        have = {field.name: (field.default, field.type) for field in fields(arguments)}
        assert wanted.items() <= have.items()


def test_gsm8k_needs_one_flag(tmp_path: Path) -> None:
    flags = DataFlags(data=write(tmp_path / "train.jsonl", MATH), template="{question} => {answer}")
    training, held_out = read_datasets(flags)
    assert held_out is None
    assert conversations(training) == [one_turn(row["question"], row["answer"]) for row in MATH]
    assert training.schema.explanation == ("template: question is the user's turn; answer is the answer that is learnt")


@pytest.mark.parametrize(
    ("told", "question", "answer"),
    [
        ({"template": "{data.q}? => {data.a.0}!"}, "q3?", "a3!"),
        ({"template": "{data.q} => {split}", "completion_template": "{data.a.0}"}, "q3 => train", "a3"),
        ({"prompt_column": "data.q", "completion_column": "data.a.0"}, "q3", "a3"),
    ],
)
def test_columns_are_told_by_path(tmp_path: Path, told: dict, question: str, answer: str) -> None:
    training, _ = read_datasets(DataFlags(data=write(tmp_path / "rows.jsonl", NESTED), **told))
    assert conversations(training)[3] == one_turn(question, answer)


def test_lists_of_messages_are_told_by_path(tmp_path: Path) -> None:
    talk = {"human": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    talk["roles"] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "rows.jsonl", [{"talk": talk}])
    for column, kind in (("talk.human", "sharegpt"), ("talk.roles", "messages")):
        training, _ = read_datasets(DataFlags(data=path, messages_column=column))
        assert training.schema.kind == kind
        assert conversations(training) == [one_turn("q", "a")]


def test_text_is_told_by_column_or_template(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"title": "T", "body": {"en": "words"}}])
    for told in ({"text_column": "body.en"}, {"shape": "text", "template": "[[{title}: ]]{body.en} => end"}):
        training, _ = read_datasets(DataFlags(data=path, **told))
        assert training.schema.kind == "text"
        texts = [to_text(row, training.schema, "row") for row in training.rows]
        assert texts == ["words" if "text_column" in told else "T: words => end"]


def test_a_shape_that_is_told_is_not_detected(tmp_path: Path) -> None:
    rows = [{"text": "t", "instruction": "i", "output": "o", "prompt": "p", "completion": "c"}]
    path = write(tmp_path / "rows.jsonl", rows)
    for shape, messages in {"alpaca": one_turn("i", "o"), "prompt_completion": one_turn("p", "c")}.items():
        assert conversations(read_datasets(DataFlags(data=path, shape=shape))[0]) == [messages]
    training, _ = read_datasets(DataFlags(data=path, shape="text"))
    assert to_text(training.rows[0], training.schema, "row") == "t"


def test_a_system_message_is_given_where_a_row_has_none(tmp_path: Path) -> None:
    own = [
        {"role": "system", "content": "Own."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    rows = [{"messages": own, "s": "x"}, {"messages": own[1:], "s": "x"}, {"messages": own[1:], "s": None}]
    training, _ = read_datasets(DataFlags(data=write(tmp_path / "rows.jsonl", rows), system="{s}"))
    heads = [conversation[0] for conversation in conversations(training)]
    assert heads == [("system", "Own."), ("system", "x"), ("user", "q")]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"template": "{a} => {b}", "prompt_column": "a", "completion_column": "b"},
            "--template and --prompt-column both",
        ),
        ({"text_column": "a", "messages_column": "b"}, "--messages-column and --text-column both say what a row is"),
        ({"prompt_column": "a"}, "--prompt-column and --completion-column go together: give both or neither"),
        ({"completion_template": "{a}"}, "--completion-template is the answer to the question that --template makes"),
        (
            {"template": "{a} => {b}", "shape": "alpaca"},
            "--template does not go with --shape alpaca, only with auto, text",
        ),
        ({"messages_column": "a", "shape": "text"}, "--messages-column does not go with --shape text"),
        ({"shape": "text", "text_column": "data.q", "system": "x"}, "--system: plain text has no messages"),
        ({"text_column": "data.q", "turns": 2}, "--turns: plain text has no turns"),
        (
            {"eval_fraction": 0.5, "eval_where": "split=dev"},
            "--eval-fraction and --eval-where both say what is held out",
        ),
        ({"eval_fraction": 1.5}, "--eval-fraction must lie between 0 and 1, got 1.5"),
        ({"eval_fraction": float("nan")}, "--eval-fraction must lie between 0 and 1, got nan"),
        ({"turns": 0}, "--turns must lie between 1 and 100, got 0"),
        ({"template": "{data.q} => {data.b}"}, "row: missing 'data.b'; there is no 'b' among a, q"),
        ({"messages_column": "data.x"}, ".*rows.jsonl: row 1: missing 'data.x'"),
        ({"shape": "alpaca"}, "row: missing 'instruction'; found data, split"),
        ({}, ".*rows.jsonl: row 1: the columns must be .*, or told, as in --template .*; found data, split"),
    ],
)
def test_flags_that_contradict_each_other_or_the_rows(tmp_path: Path, told: dict, message: str) -> None:
    flags = DataFlags(data=write(tmp_path / "rows.jsonl", NESTED), **told)
    with pytest.raises(ValueError, match=f"^{message}"):
        conversations(read_datasets(flags)[0])


TOLD = {"prompt_column": "data.q", "completion_column": "data.a.0"}


def questions(dataset: Dataset) -> list[str]:
    return [conversation[0][1] for conversation in conversations(dataset)]


def test_a_fraction_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", NESTED)
    sides = [read_datasets(DataFlags(data=path, eval_fraction=0.25, data_seed=seed, **TOLD)) for seed in (0, 0, 1)]
    (training, held_out), again, other = ([questions(side) for side in pair] for pair in sides)
    assert sorted(training + held_out) == sorted(f"q{i}" for i in range(12))
    assert len(held_out) == 3
    assert [training, held_out] == again != other
    assert "; 9 of 12 rows train, 3 are held out (0.25 at random, seed 0)" in sides[0][0].schema.explanation


def test_a_columns_value_is_held_out_and_the_rest_is_named(tmp_path: Path) -> None:
    rows = [*NESTED, {**NESTED[0], "split": "test"}]
    path = write(tmp_path / "rows.jsonl", rows)
    training, held_out = read_datasets(DataFlags(data=path, eval_where="split=dev", **TOLD))
    assert questions(held_out) == ["q0", "q4", "q8"]
    assert len(training.rows) == 10
    assert training.schema.explanation.endswith("(split=dev); split of those that train: train (9), test (1)")
    training, held_out = read_datasets(DataFlags(data=path, eval_where="split=dev", train_where="split=train", **TOLD))
    assert (len(training.rows), len(held_out.rows)) == (9, 3)
    training, held_out = read_datasets(DataFlags(data=path, train_where="split=train", eval_fraction=0.34, **TOLD))
    assert (len(training.rows), len(held_out.rows)) == (6, 3)
    with pytest.raises(ValueError, match="--eval-where split=dev leaves no row to train on"):
        read_datasets(DataFlags(data=path, eval_where="split=dev", train_where="split=dev", **TOLD))


def test_a_file_is_held_out_and_rows_in_both_are_counted(tmp_path: Path) -> None:
    path, held = write(tmp_path / "rows.jsonl", NESTED), write(tmp_path / "held.jsonl", NESTED[:2])
    training, held_out = read_datasets(DataFlags(data=path, eval_data=held, **TOLD))
    assert (len(training.rows), questions(held_out)) == (12, ["q0", "q1"])
    assert "; 2 of the 2 held-out rows also train" in training.schema.explanation
    training, _ = read_datasets(DataFlags(data=path, eval_data=held, train_where="split=train", **TOLD))
    assert len(training.rows) == 9


def test_turns_are_merged_after_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", NESTED)
    for reuse, n, times in ((True, 8, "2 times"), (False, 4, "once")):
        flags = DataFlags(data=path, turns=2, row_reuse=reuse, eval_fraction=0.34, **TOLD)
        training, held_out = read_datasets(flags)
        assert (len(training.rows), len(held_out.rows)) == (n, n // 2)
        said = [
            {content for conversation in conversations(side) for role, content in conversation if role == "user"}
            for side in (training, held_out)
        ]
        assert not said[0] & said[1]
        assert len(said[0] | said[1]) == 12
        assert (
            f"8 rows merged at random (seed 0) into {n} conversations of 2 turns, each row used {times} an epoch"
            in (training.schema.explanation)
        )


def test_a_bad_row_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    rows = [*NESTED, {"data": {"q": "q", "a": [" "]}, "split": "train"}]
    path = write(tmp_path / "rows.jsonl", rows)
    for told in ({"eval_fraction": 0.5}, {"eval_where": "split=dev"}, {"turns": 2}):
        with pytest.raises(ValueError, match=r"rows.jsonl: row 13: the answer \(message 2\) is empty$"):
            read_datasets(DataFlags(data=path, **told, **TOLD))


def test_the_templates_in_the_docs_make_what_they_say() -> None:
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page.partition("## Training data")[2].partition("\n## ")[0]
    row = json.loads(re.search(r"```json\n(.*)\n```", section)[1])
    lines = re.findall(r"^\| `(.* => .*)` \| `(.*)` \| `(.*)` \|$", section, re.MULTILINE)
    assert len(lines) == 4
    for template, question, answer in lines:
        sides = parse_question_and_answer(template)
        assert [fill(side, row, "row 1") for side in sides] == [question, answer]
    for kind, shape in SHAPES.items():
        (columns,) = re.findall(rf"^\| {kind} \| (.*?) \|", section, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", columns)) == shape.required | shape.optional
    assert all(f"{ending}`" in section for ending in ENDINGS)

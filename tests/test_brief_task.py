"""data/brief_task.py and `qlora demo dpo`: splits share no fact, both answers are right, outputs are scored alone."""

import json
from pathlib import Path

import pytest
import torch

from commands import demo_preference
from commands.demo_preference import MEASURED, READ_NEXT, DPODemoArgs, ORPODemoArgs, Trial, compared
from data.brief_task import MOST_WORDS, SPLITS, Score, make_split, score
from data.brief_words import FILLERS, TRAIN_KINDS
from data.preference import encode_pairs
from data.schema import detect
from models import load_tokenizer
from tests.small_base import write_base

ALL = {split: make_split(split, n) for split, n in (("train", 300), ("recombined", 100), ("unseen", 80))}


def facts_in(prompts: set[str]) -> set[tuple[str, str]]:
    """The facts of the training kinds that some of the prompts ask for."""
    return {
        (name, asked)
        for name, kind in TRAIN_KINDS.items()
        for asked, _ in kind.facts
        if any(question.format(x=asked) in prompts for question in kind.questions)
    }


def test_no_question_or_filler_of_the_training_rows_is_held_out() -> None:
    texts = {split: {row["prompt"] for row in rows} for split, rows in ALL.items()}
    assert [len(texts[split]) for split in SPLITS] == [300, 100, 80]
    assert not texts["train"] & (texts["recombined"] | texts["unseen"])
    facts = {split: facts_in(texts[split]) for split in ("train", "recombined")}
    assert not facts["train"] & facts["recombined"], "a fact is on one side in all its forms"
    assert min(map(len, facts.values())) > 20
    assert not set(FILLERS["train"]) & set(FILLERS["held out"])
    for split, rows in ALL.items():
        fillers = FILLERS["train" if split == "train" else "held out"]
        assert all(any(filler in row["rejected"] for filler in fillers) for row in rows)


def test_both_answers_are_right_and_only_one_is_brief() -> None:
    for rows in ALL.values():
        assert set(score([row["chosen"] for row in rows], rows)) == {Score(brief=True, right=True)}
        assert set(score([row["rejected"] for row in rows], rows)) == {Score(brief=False, right=True)}


def test_rows_are_a_function_of_split_seed_and_number() -> None:
    assert make_split("train", 10) == ALL["train"][:10]
    assert make_split("train", 10, seed=1) != ALL["train"][:10]
    with pytest.raises(ValueError, match=r"^split must be one of train, recombined, unseen, got 'test'$"):
        make_split("test", 1)
    with pytest.raises(ValueError, match=r"^split unseen has \d+ different questions, asked for 999$"):
        make_split("unseen", 999)


@pytest.mark.parametrize(
    ("output", "brief", "right"),
    [
        ("Rome.", True, True),
        ("It is rome", True, True),
        ("", False, False),
        ("Romeo", True, False),
        ("The capital is Rome", False, True),
        ("Paris", True, False),
    ],
)
def test_an_output_is_brief_by_its_words_and_right_by_the_answer_in_it(output: str, brief: bool, right: bool) -> None:
    assert score([output], [{"answer": "Rome"}]) == [Score(brief, right)]
    assert MOST_WORDS == 3


def test_what_is_compared() -> None:
    """DPO's reward is the change of a sum, which has no order before training; ORPO's is the mean a token."""
    before = Trial(["a b c d", "Rome"], score(["a b c d", "Rome"], [{"answer": "Rome"}] * 2),
                   torch.tensor([[-9.0, -9.0], [-2.0, -2.0]]), torch.tensor([[-9.0, -1.0], [-2.0, -2.0]]))  # fmt: skip
    after = Trial(["Rome", "Rome"], score(["Rome", "Rome"], [{"answer": "Rome"}] * 2),
                  torch.tensor([[-8.0, -9.0], [-2.0, -2.0]]), torch.tensor([[-1.0, -1.0], [-2.0, -2.0]]))  # fmt: skip
    numbers = compared("dpo", before, after)
    assert numbers == {
        "brief": [0.5, 1.0],
        "right": [0.5, 1.0],
        "words": [2.5, 1.0],
        "chosen_likelier_a_token": [0.5, 1.0],
        "implicit_reward_accuracy": [None, 0.5],
    }
    assert "implicit_reward_accuracy" not in compared("orpo", before, after)
    assert set(numbers) == set(MEASURED)


@pytest.mark.parametrize("arguments", [DPODemoArgs, ORPODemoArgs])
def test_the_demo_runs_from_its_pairs_to_its_numbers(arguments, tmp_path: Path, monkeypatch, capsys) -> None:
    """On the tiny model: every file is there, and what is measured is told in words."""
    monkeypatch.setenv("COLUMNS", "200")
    base = write_base(tmp_path / "base")
    monkeypatch.setattr(demo_preference, "MODEL", str(base))
    monkeypatch.setattr(demo_preference, "LONGEST", 4)
    out = tmp_path / "demo"
    demo_preference.run(arguments(out=str(out), train_rows=16, held_out_rows=3, steps=2))
    result = json.loads((out / "result.json").read_text())
    for split in ("recombined", "unseen"):
        assert result["before_and_after"][split]["words"][0] >= 0
        assert ("implicit_reward_accuracy" in result["before_and_after"][split]) == (arguments is DPODemoArgs)
    said = capsys.readouterr().out
    assert f"try it: qlora generate --quantize nf4 --adapter {out / 'run' / 'adapter'}" in said
    assert f"read next: {READ_NEXT[arguments.TRAINER]}" in said
    assert "right answer" in said
    told = " ".join(said.split())
    assert all((label in told) == (name in result["before_and_after"]["unseen"]) for name, label in MEASURED.items())
    rows = [json.loads(line) for line in (out / "data" / "held_out.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert len(encode_pairs(load_tokenizer(base), rows, detect(rows, "p"), max_seq_length=256, path="p").pairs) == 6
    with pytest.raises(ValueError, match=r"is not an earlier demo's folder: it holds base"):
        demo_preference.run(arguments(out=str(tmp_path)))

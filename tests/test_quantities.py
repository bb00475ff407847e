"""data/quantities: rows are right by the sentence itself, differ, and depend on (split, seed, number) alone."""

import itertools
import json
import re

import pytest

from commands.task import TaskArgs, run
from data.quantities import SPLITS, THINGS, VERBS, make_quantities


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_is_the_number_before_the_thing_asked_for(split):
    rows = make_quantities(split, 200)
    for row in rows:
        thing = re.search(r"How many (\w+) did", row["prompt"])[1]
        counted = {name: number for number, name in re.findall(r"(\d+) (\w+)", row["prompt"])}
        assert counted[thing] == row["completion"]
        assert thing in THINGS[split]
    assert len({row["prompt"] for row in rows}) == 200
    assert {row["prompt"].count(" and ") for row in rows} == {0, 1}
    for place in (0, -1):
        right = [re.findall(r"\d+", row["prompt"])[place] == row["completion"] for row in rows]
        assert abs(sum(right) / 200 - 0.75) <= 0.1, "what giving the first or the last number scores, within 3 sigma"
    assert rows[:50] == make_quantities(split, 50)
    assert rows != make_quantities(split, 200, seed=1)


def test_no_two_splits_share_a_thing_or_a_verb():
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(THINGS[one]) & set(THINGS[other])
        assert not set(VERBS[one]) & set(VERBS[other])
    with pytest.raises(ValueError, match="split must be one of train, dev, unseen, got 'test'"):
        make_quantities("test", 1)


def test_the_command_writes_a_file_for_each_split(tmp_path, capsys):
    run(TaskArgs("quantities", str(tmp_path / "rows"), train_rows=5, held_out_rows=3))
    lengths = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "rows").iterdir()}
    assert lengths == {"train.jsonl": 5, "dev.jsonl": 3, "unseen.jsonl": 3}
    assert json.loads((tmp_path / "rows" / "train.jsonl").read_text().splitlines()[0]) == make_quantities("train", 1)[0]
    run(TaskArgs("records", str(tmp_path / "more"), train_rows=2, held_out_rows=1))
    assert {path.stem for path in (tmp_path / "more").iterdir()} == {"train", "recombined", "unseen"}
    with pytest.raises(ValueError, match="must be at least 1"):
        run(TaskArgs("records", str(tmp_path), train_rows=0))

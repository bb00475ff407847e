"""Hostile and broken data files through `qlora sft`: one clear line, no run folder, and no long wait or full memory."""

import gzip
import json
import time
from pathlib import Path

import pytest

import qlora
from tests.small_base import write_base
from trainers.metrics import peak_memory_bytes

LINE = b'{"prompt": "a", "completion": "b"}\n'
TEMPLATE = ["--template", "{prompt} => {completion}"]
DEEP = b'{"prompt": "a", "completion": "b", "x": ' + b'{"x": ' * 900 + b"1" + b"}" * 901 + b"\n"


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# name, content, flags, what the line must say
CASES = [
    ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", [], "not readable as parquet"),
    ("a.parquet", b"PAR1" + b"\x15\x04" * 50 + b"\xff\xff\xff\x7fPAR1", [], "not readable as parquet"),
    ("a.parquet", LINE, [], "not readable as parquet"),
    ("a.jsonl.gz", gzip.compress(b"x" * 200_000_000, 1, mtime=0), [], "line 1: longer than 67,108,864 bytes"),
    ("a.txt.gz", gzip.compress(b"word\n" * 9, mtime=0)[:20], [], "damaged or cut short"),
    ("a.jsonl", LINE * 3 + b'{"prompt": "a", "prompt": "c", "completion": "b"}', [], "line 4: not read: key"),
    ("a.jsonl", b'{"prompt": "a", "completion": NaN}', [], "line 1: not read: NaN is no JSON number"),
    ("a.jsonl", b'{"prompt": "a", "completion": 1e999}', TEMPLATE, "a number that is not finite"),
    ("a.jsonl", DEEP, [], "line 1: not read: nested too deep"),
    ("a.json", b"[" + b"[" * 200_000, [], "nested too deep"),
    ("a.jsonl", b'{"prompt": ' + b"9" * 10_000 + b"}", TEMPLATE, "line 1: not read: Exceeds the limit"),
    ("a.jsonl", LINE + b'{"prompt": "caf\xe9"}', [], "line 2: byte 16 (0xe9) is not UTF-8"),
    ("a.jsonl", b'{"prompt": "\\ud83d", "completion": "b"}', [], "row 1: 'prompt' has half a character"),
    ("a.jsonl", LINE + b'"' + b"x" * (64 * 2**20), [], "line 2: longer than 67,108,864 bytes"),
    ("a.jsonl", jsonl({f"column{i}": 1 for i in range(100_000)}), [], "and 99,980 more"),
    ("a.jsonl", b'{' + b'"a": 1, ' * 200_000 + b'"b": 2}', [], "key 'a' stands twice"),
    ("a.csv", ("a," * 200_000 + "a\n").encode(), [], "column 'a' stands twice in the header"),
    ("a.csv", b'prompt,completion\n"a\n', [], "not csv: unexpected end of data"),
    ("a.jsonl", jsonl({"\x1b[2J\nevil": 1}), [], r"found '\x1b[2J\nevil'"),
    ("a.jsonl", jsonl({"conversations": [{"from": "narrator", "value": "x"}]}), [], "found 'narrator'"),
    ("a.jsonl", jsonl({"conversations": {"from": "human"}}), [], "must be a list with messages in it, found an object"),
    ("a.jsonl", jsonl({"messages": [[], {}]}), [], "message 1 must be an object with role and content"),
    ("a.jsonl", jsonl({"text": 7}), [], "row 1: 'text' must be text, found a number"),
    ("a.jsonl", jsonl({"text": " "}), [], "nothing to learn"),
    ("a.jsonl", LINE, ["--template", "{prompt} => {answer}"], "row 1: missing 'answer'; found completion, prompt"),
    ("a.jsonl", LINE, ["--template", "[[" * 30_001 + " => {prompt}"], "--template: "),
    ("a.jsonl", LINE, ["--template", "{" * 100_001 + " => {prompt}"], "at most 100,000"),
    ("a.jsonl", jsonl({"v": "x" * 100_000}), ["--template", "{v}" * 9_999 + " => {v}"], "makes 999,900,000 characters"),
    ("a.jsonl", LINE, ["--template", "{prompt.__class__} => {prompt}"], "missing 'prompt.__class__'"),
    ("a.jsonl", LINE, ["--prompt-column", "prompt.0", "--completion-column", "prompt"], "missing 'prompt.0'"),
    ("a.jsonl", LINE * 3, ["--turns", "999999999999"], "--turns must lie between 1 and 100"),
    ("a.jsonl", LINE, ["--turns", "2"], "2 turns need at least 2 different rows"),
    ("a.jsonl", LINE * 3, ["--eval-fraction", "nan"], "--eval-fraction must lie between 0 and 1"),
    ("a.jsonl", LINE * 3, ["--eval-fraction", "0.5"], "3 rows with one content cannot be split"),
    ("a.jsonl", LINE * 3, ["--eval-where", "prompt=z"], "no row has that value; prompt is a (3)"),
    ("a.jsonl", LINE, ["--eval-data", "nowhere.parquet"], "nowhere.parquet: no such file"),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.mark.parametrize(("name", "content", "flags", "said"), CASES, ids=lambda value: str(value)[:40])
def test_bad_data_is_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, content: bytes, flags: list[str], said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    before, start = peak_memory_bytes(), time.perf_counter()
    run = ["sft", "--data", str(tmp_path / name), "--out", str(tmp_path / "run"), "--model", str(base), *flags]
    assert qlora.main(run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert error[:-1].isprintable()
    assert len(error) < 1000
    assert not (tmp_path / "run").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert time.perf_counter() - start < 20
    assert peak_memory_bytes() - before < 1.5e9

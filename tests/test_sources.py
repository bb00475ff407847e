"""data/sources.py: every format gives the same rows to the byte; every bad file is one line with its place."""

import csv
import json
import unicodedata
from pathlib import Path

import pytest

from data import read_rows, sources

ROWS = [
    {
        "instruction": "Dịch sang tiếng Việt",
        "input": 'a\tb, "c"\r\nd',
        "output": "Nguyễn 🙂👩‍👩‍👧 e\u0301 \u2028 \u200f",
    },
    {"instruction": "  spaces  ", "input": "", "output": unicodedata.normalize("NFD", "ộ") + "\n"},
]


def write_csv(path: Path, encoding: str = "utf-8") -> None:
    with path.open("w", encoding=encoding, newline="") as handle:
        writer = csv.DictWriter(handle, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl_and_json_survive_to_the_byte(tmp_path: Path, encoding: str, ascii_only: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding=encoding)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=ascii_only, indent=1), encoding=encoding)
    assert read_rows(tmp_path / "rows.jsonl") == ROWS
    assert read_rows(tmp_path / "rows.json") == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_survives_to_the_byte(tmp_path: Path, encoding: str) -> None:
    write_csv(tmp_path / "rows.csv", encoding)
    assert read_rows(tmp_path / "rows.csv") == ROWS


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\r\n\r\n  \n{"a": 2}\n\n')
    (tmp_path / "rows.csv").write_bytes(b"a,b\r\n1,2\r\n\r\n3,4\r\n")
    assert read_rows(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]
    assert read_rows(tmp_path / "rows.csv") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_a_split_is_a_file_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}')
    (tmp_path / "test.csv").write_text("a\n2")
    assert read_rows(f"{tmp_path}:train") == [{"a": 1}]
    assert read_rows(f"{tmp_path}:test") == [{"a": "2"}]


def test_a_colon_in_a_file_name_is_no_split(tmp_path: Path) -> None:
    (tmp_path / "a:b.jsonl").write_text('{"a": 1}')
    assert read_rows(tmp_path / "a:b.jsonl") == [{"a": 1}]


def test_a_long_csv_value_is_read_and_the_limit_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text("a\n" + "x" * (before + 1))
    assert len(read_rows(tmp_path / "rows.csv")[0]["a"]) == before + 1
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: is empty$"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: has no rows$"),
        ("a.json", b"[]", r"a\.json: has no rows$"),
        ("a.csv", b"a,b\n", r"a\.csv: has no rows$"),
        ("a.csv", b"\n\n", r"a\.csv: has no rows$"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1,}\n', r"a\.jsonl: line 2: not JSON: .* at column \d+$"),
        ("a.jsonl", b'{"a": 1}\n\n{"a"', r"a\.jsonl: line 3: not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl: line 2: must be an object with named columns, found a list$"),
        ("a.jsonl", b"true", r"a\.jsonl: line 1: must be an object .* found true or false$"),
        ("a.json", b'[{"a": 1}, null]', r"a\.json: row 2: must be an object .* found null$"),
        ("a.json", b'[\n{"a": 1},\n{"a" 1}]', r"a\.json: not JSON: .* at line 3, column 6$"),
        ("a.json", b'{"a": 1}\n{"a": 2}', r"a\.json: not JSON: Extra data .*one object a line is \.jsonl$"),
        ("a.json", b'{"a": 1}', r"a\.json: must be a list of objects, found an object; one object a line is \.jsonl$"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: line 1: not read: nested too deep$"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"a\.jsonl: line 1: not read: Exceeds the limit"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\0"}', r"a\.jsonl: line 2: byte 8 is NUL"),
        ("a.csv", b"a\nx\0y", r"a\.csv: line 2: byte 2 is NUL"),
        ("a.jsonl", '{"a": "é"}'.encode("latin-1"), r"a\.jsonl: line 1: byte 8 \(0xe9\) is not UTF-8$"),
        ("a.json", "[\n]".encode("utf-16"), r"a\.json: line 1: this is UTF-16; save the file as UTF-8$"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv: line 3: 3 values for the 2 columns of the header$"),
        ("a.csv", b"a,b\n1\n", r"a\.csv: line 2: 1 values for the 2 columns"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv: line 1: column 'a' stands twice in the header$"),
        ("a.csv", b'a,b\n"1" 2,3\n', r"a\.csv: line 2: not csv: "),
        ("a.csv", b'a\n"never closed\n\n', r"a\.csv: line 3: not csv: unexpected end of data$"),
        (
            "a.xlsx",
            b"PK",
            r"a\.xlsx: unknown ending '\.xlsx'; data files end in \.jsonl, \.json, \.csv, \.parquet, \.txt$",
        ),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_rows(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_files_folders_and_splits(tmp_path: Path) -> None:
    for name, message in {
        "none.jsonl": "no such file$",
        "none:train": "no such folder to take split 'train'$",
        "": r"is a folder; name a split, as in .*:train \(files: a.csv, a.jsonl\)$",
        ":b": r"split 'b' must be one file; the folder has none of b.jsonl, b.json, b.csv, b.parquet, b.txt$",
        ":a": r"split 'a' must be one file; the folder has a.jsonl and a.csv$",
        "a.csv:train": "is not a folder, so that it has no split 'train'$",
    }.items():
        (tmp_path / "a.jsonl").write_text('{"a": 1}')
        (tmp_path / "a.csv").write_text("a\n1")
        path = f"{tmp_path}{name}" if name.startswith(":") else str(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            read_rows(path)


def test_what_is_read_at_once_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 10)
    monkeypatch.setattr(sources, "MAX_JSON_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + b"x" * 1000)
    (tmp_path / "a.json").write_bytes(b"[\n" + b'{"a":1},\n' * 20 + b"]")
    (tmp_path / "a.csv").write_bytes(b'a\n"' + b"x\n" * 20)
    with pytest.raises(ValueError, match=r"line 2: longer than 10 bytes"):
        read_rows(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"bytes of \.json are read at once, at most 100; use \.jsonl"):
        read_rows(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.csv: line \d+: not csv: field larger than field limit \(10\)"):
        read_rows(tmp_path / "a.csv")

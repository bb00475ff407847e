"""data/sources.py: every format gives the same rows to the byte; every bad file is one line with its place."""

import csv
import gzip
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


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_gz_file_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    write_csv(tmp_path / "rows.csv")
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert read_rows(tmp_path / f"{name}.gz") == ROWS


def test_a_txt_file_is_one_document_and_a_folder_of_them_several(tmp_path: Path) -> None:
    text = "\r\n First line\n\n\tlast line, e\u0301 \u2028 without an end"
    (tmp_path / "b.txt").write_bytes(text.encode("utf-8-sig"))
    (tmp_path / "a.txt").write_bytes(b"first\n")
    (tmp_path / "notes").mkdir()
    assert read_rows(tmp_path / "b.txt") == [{"text": text}]
    assert read_rows(tmp_path) == [{"text": "first\n"}, {"text": text}]
    (tmp_path / "c.csv").write_text("a\n1")
    with pytest.raises(ValueError, match=r"is a folder; name a split, as in .*:train \(files: a.txt, b.txt, c.csv\)$"):
        read_rows(tmp_path)


def test_pieces_of_a_split_are_read_in_order_and_all_of_them(tmp_path: Path) -> None:
    for i, line in enumerate(['{"a": 0}', '{"a": 1}\n{"a": 2}', '{"a": 3}']):
        (tmp_path / f"train-0000{i}-of-00003.jsonl").write_text(line)
    (tmp_path / "test-00000-of-00001.jsonl").write_text('{"a": 9}')
    assert read_rows(f"{tmp_path}:train") == [{"a": i} for i in range(4)]
    (tmp_path / "train-00001-of-00003.jsonl").unlink()
    with pytest.raises(ValueError, match=r"pieces of split 'train' are missing or double: found train-00000-of-00003"):
        read_rows(f"{tmp_path}:train")


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
        ("a.jsonl", b'{"a": 1, "b": 2, "a": 3}', r"a\.jsonl: line 1: not read: key 'a' stands twice in one object$"),
        ("a.json", b'[{"b": {"a": 1, "a": 1}}]', r"a\.json: not read: key 'a' stands twice in one object$"),
        ("a.jsonl", b'{"a": 1}\n{"a": NaN}', r"line 2: not read: NaN is no JSON number; null says that there is none$"),
        ("a.jsonl", b'{"a": [-Infinity]}', r"line 1: not read: -Infinity is no JSON number"),
        ("a.jsonl", b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", r"line 1: not read: nested too deep \(more than 64 "),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9],
            r"line \d+: the gzip file is damaged or cut short: ",
        ),
        ("a.jsonl.gz", b'{"a": 1}\n', r"line 1: the gzip file is damaged or cut short: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a\.jsonl\.gz: has no rows$"),
        ("a.txt", b"caf\xe9", r"a\.txt: line 1: byte 4 \(0xe9\) is not UTF-8$"),
        ("a.txt", b"GIF89a\0\0", r"a\.txt: line 1: byte 7 is NUL, so this is no text file$"),
        ("a.txt", b"", r"a\.txt: is empty$"),
        ("a.parquet.gz", b"x", r"unknown ending '\.parquet\.gz'"),
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
    (tmp_path / "a.txt").write_bytes(b"words\n" * 20)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000, mtime=0))
    monkeypatch.setattr(sources, "MAX_UNPACKED_BYTES", 500)
    with pytest.raises(ValueError, match=r"bytes of \.txt are read at once, at most 100; cut it into several files$"):
        read_rows(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: line 56: unpacks to more than 500 bytes$"):
        read_rows(tmp_path / "b.jsonl.gz")
    with pytest.raises(ValueError, match=r"line 2: longer than 10 bytes"):
        read_rows(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"bytes of \.json are read at once, at most 100; use \.jsonl"):
        read_rows(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.csv: line \d+: not csv: field larger than field limit \(10\)"):
        read_rows(tmp_path / "a.csv")

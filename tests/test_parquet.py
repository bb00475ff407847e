"""data/parquet.py: a parquet file gives the rows that jsonl gives; every bad one is one line; nothing is unbounded."""

import builtins
import datetime
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data import detect, parquet, read_rows, to_messages

ROWS = [
    {
        "prompt": "Dịch 🙂 e\u0301\r\n",
        "completion": "Nguyễn\t",
        "n": 1,
        "ok": True,
        "data": {"turns": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    },
    {"prompt": "", "completion": None, "n": None, "ok": None, "data": {"turns": []}},
]


def write(path: Path, rows: list[dict], **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def complaint(path: Path) -> str:
    """What is said against the file; nothing where it is read."""
    try:
        read_rows(path)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("repeat", [1, 1500])  # 3000 rows are several batches
def test_rows_are_those_that_were_written(tmp_path: Path, compression: str, repeat: int) -> None:
    path = write(tmp_path / "rows.parquet", ROWS * repeat, compression=compression, row_group_size=700)
    assert read_rows(path) == ROWS * repeat


def test_a_split_may_lie_in_pieces_as_on_the_hub(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        write(tmp_path / f"train-0000{i}-of-00002.parquet", [row])
    assert [row["prompt"] for row in read_rows(f"{tmp_path}:train")] == [row["prompt"] for row in ROWS]


def test_lists_of_structs_are_messages(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    rows = read_rows(write(tmp_path / "rows.parquet", [{"conversations": turns}]))
    schema = detect(rows, "rows.parquet")
    assert schema.kind == "sharegpt"
    assert [message["content"] for message in to_messages(rows[0], schema, "row 1")] == ["Hello", "Hi"]


def test_a_date_is_no_text(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "rows.parquet", [{"prompt": datetime.date(2024, 1, 2), "completion": b"x"}]))
    with pytest.raises(ValueError, match="'prompt' must be text, found date"):
        to_messages(rows[0], detect(rows, "rows"), "rows: row 1")
    with pytest.raises(ValueError, match="'completion' must be text, found bytes"):
        to_messages({**rows[0], "prompt": "a"}, detect(rows, "rows"), "rows: row 1")


def test_a_file_cut_anywhere_or_changed_anywhere_is_one_line_or_still_rows(tmp_path: Path) -> None:
    whole = write(tmp_path / "rows.parquet", ROWS * 20, compression="none").read_bytes()
    bad = tmp_path / "bad.parquet"
    for stop in range(1, len(whole), 97):
        bad.write_bytes(whole[:stop])
        with pytest.raises(ValueError, match=r"bad\.parquet: not readable as parquet: ") as error:
            read_rows(bad)
        assert "\n" not in str(error.value)
    for place in range(4, len(whole), 61):
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert re.fullmatch(rf"|{re.escape(str(bad))}: .+", complaint(bad))


def test_text_that_is_not_utf8_names_its_column(tmp_path: Path) -> None:
    column = pyarrow.array([b"ok", b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: rows 1 to 2: column 'prompt' holds text that is not UTF-8$"):
        read_rows(tmp_path / "a.parquet")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: column 'text' stands twice$"):
        read_rows(tmp_path / "a.parquet")


def test_a_small_file_of_many_rows_is_refused_before_it_is_read(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays([0] * 1000, ["x"])})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        many = pyarrow.concat_tables([table] * 1001)
        for _ in range(10):
            writer.write_table(many)
    with pytest.raises(ValueError, match=r"a.parquet: says that it holds 10,010,000 rows .*; split it$"):
        read_rows(tmp_path / "a.parquet")


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", [{"text": "x" * 1000}] * 5000, compression="zstd")
    monkeypatch.setattr(parquet, "MAX_BYTES", 1_000_000)
    monkeypatch.setattr(parquet, "_check", lambda source, file: None)  # a file may lie of itself
    with pytest.raises(ValueError, match=r"a.parquet: holds more than .* rows or 1,000,000 bytes; split it$"):
        read_rows(path)


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    importer = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return importer(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"a.parquet: reading .parquet needs pyarrow: pip install 'pyarrow>=16'$"):
        read_rows(path)


def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: has no rows$"):
        read_rows(tmp_path / "a.parquet")

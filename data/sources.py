"""A user's file becomes rows: a list of dicts, one a line of jsonl, one an object of json, one a record of csv.

    orders.jsonl · orders.json · orders.csv        one file
    orders:train                                   the file train.jsonl, train.json or train.csv in the folder orders

Text is UTF-8, with or without a byte order mark, and survives to the byte: no normalisation, no trimming. Every error
names the file and the line. A file that is no text is refused early: no line may be longer than MAX_LINE_BYTES and no
.json longer than MAX_JSON_BYTES, so that what is read at once is bounded. Every csv value is text.

Left out: parquet, compressed files, and reading in a stream (rows of training data fit in memory).
"""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 64 * 2**20
MAX_JSON_BYTES = 2**30

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of `path` (FILE, or FOLDER:SPLIT), at least one.

    Raises ValueError for a missing, empty or malformed file, naming the line, and for an ending that is not known.
    """
    file = _find(str(path))
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{file}: unknown ending {file.suffix!r}; data files end in {', '.join(READERS)}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file}: is empty")
    rows = reader(file)
    if not rows:
        raise ValueError(f"{file}: has no rows")
    return rows


def _find(path: str) -> Path:
    """The file meant by FILE or FOLDER:SPLIT."""
    file = Path(path)
    folder, colon, split = path.rpartition(":")
    if colon and not file.exists():
        return _split_file(Path(folder), split)
    if file.is_dir():
        splits = sorted(found.name for found in file.iterdir() if found.suffix.lower() in READERS)
        raise ValueError(
            f"{path}: is a folder; name a split, as in {path}:train (files: {', '.join(splits) or 'none'})"
        )
    if not file.is_file():
        raise ValueError(f"{path}: {'is not a regular file' if file.exists() else 'no such file'}")
    return file


def _split_file(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        what = "is not a folder, so that it has no split" if folder.exists() else "no such folder to take split"
        raise ValueError(f"{folder}: {what} {split!r}")
    names = [f"{split}{ending}" for ending in READERS]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        have = f"has {' and '.join(file.name for file in found)}" if found else f"has none of {', '.join(names)}"
        raise ValueError(f"{folder}: split {split!r} must be one file; the folder {have}")
    return found[0]


def _read_jsonl(file: Path) -> list[Row]:
    rows = []
    for number, line in _lines(file):
        if line.strip():
            rows.append(_object(_parse(line, f"{file}: line {number}"), f"{file}: line {number}"))
    return rows


def _read_json(file: Path) -> list[Row]:
    if (size := file.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{file}: {size:,} bytes of .json are read at once, at most {MAX_JSON_BYTES:,}; use .jsonl")
    text = "".join(line for _, line in _lines(file))
    rows = _parse(text, str(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file}: must be a list of objects, found {_kind(rows)}; one object a line is .jsonl")
    return [_object(row, f"{file}: row {number}") for number, row in enumerate(rows, start=1)]


def _read_csv(file: Path) -> list[Row]:
    longest = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        reader = csv.reader((line for _, line in _lines(file)), strict=True)
        return _records(reader, file)
    except csv.Error as error:
        raise ValueError(f"{file}: line {reader.line_num}: not csv: {error}") from error
    finally:
        csv.field_size_limit(longest)


def _records(reader: Any, file: Path) -> list[Row]:
    """The header's names with each record's values. A blank line is no record."""
    header: list[str] = next((record for record in reader if record), [])
    if twice := {name for name in header if header.count(name) > 1}:
        raise ValueError(f"{file}: line {reader.line_num}: column {min(twice)!r} stands twice in the header")
    rows = []
    for record in reader:
        if record and len(record) != len(header):
            raise ValueError(
                f"{file}: line {reader.line_num}: {len(record)} values for the {len(header)} columns of the header"
            )
        if record:
            rows.append(dict(zip(header, record, strict=True)))
    return rows


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line with its end) of a UTF-8 text file."""
    with file.open("rb") as handle:
        number = 0
        while line := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = _without_bom(line, file)
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{file}: line {number}: longer than {MAX_LINE_BYTES:,} bytes, so hardly a text file")
            if b"\0" in line:
                raise ValueError(f"{file}: line {number}: byte {line.index(0) + 1} is NUL, so this is no text file")
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}: line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8"
                ) from error


def _without_bom(line: bytes, file: Path) -> bytes:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{file}: line 1: this is UTF-16; save the file as UTF-8")
    return line.removeprefix(codecs.BOM_UTF8)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text.strip() else f"line {error.lineno}, column {error.colno}"
        hint = "; one object a line is .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{where}: not JSON: {error.msg} at {place}{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not read: nested too deep") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"{where}: not read: {' '.join(str(error).split())}") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object with named columns, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

"""A user's file becomes rows: a list of dicts, one a line of jsonl, an object of json, a record of csv or parquet.

    orders.jsonl · .json · .csv · .parquet   one file; .jsonl.gz, .json.gz, .csv.gz and .txt.gz are unpacked
    book.txt                                 one row {text}: the whole file is one document
    books                                    a folder of .txt files: one row each, in the order of their names
    orders:train                             the file train.jsonl (or another ending) in the folder orders,
                                             or its pieces train-00000-of-00002.parquet, …, as Hugging Face writes them

Text is UTF-8, with or without a byte order mark, and survives to the byte: no normalisation, no trimming. Every error
names the file and the line. JSON is strict: a key that stands twice in an object, and NaN, are errors, since a reader
that takes them loses or changes something in silence. What is read at once is bounded: see the MAX_ constants. Every
csv value is text.

Left out: reading in a stream (rows of training data fit in memory), and other compressions than gzip.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .columns import kind_of, names, twice
from .parquet import read_parquet

MAX_LINE_BYTES = 64 * 2**20
MAX_JSON_BYTES = 2**30  # of a .json or .txt, which are read whole
MAX_UNPACKED_BYTES = 4 * 2**30  # of a .gz
MAX_DEPTH = 64  # lists and objects in one another

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of `path` (FILE, FOLDER of .txt, or FOLDER:SPLIT), at least one.

    Raises ValueError for a missing, empty or malformed file, naming the line, and for an ending that is not known.
    """
    return [row for file in _find(str(path)) for row in _read(file)]


def _read(file: Path) -> list[Row]:
    ending = _ending(file)
    if ending not in READERS:
        raise ValueError(f"{file}: unknown ending {ending!r}; data files end in {', '.join(ENDINGS)}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file}: is empty")
    rows = READERS[ending](file)
    if not rows:
        raise ValueError(f"{file}: has no rows")
    return rows


def _ending(file: Path) -> str:
    """'.jsonl' of rows.jsonl, '.jsonl.gz' of rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def _find(path: str) -> list[Path]:
    """The files meant by FILE, FOLDER or FOLDER:SPLIT."""
    file = Path(path)
    folder, colon, split = path.rpartition(":")
    if colon and not file.exists():
        return _split_files(Path(folder), split)
    if file.is_dir():
        found = sorted(each for each in file.iterdir() if _ending(each) in READERS)
        if found and all(_ending(each) in (".txt", ".txt.gz") for each in found):
            return found
        files = names([each.name for each in found])
        raise ValueError(f"{path}: is a folder; name a split, as in {path}:train (files: {files or 'none'})")
    if not file.is_file():
        raise ValueError(f"{path}: {'is not a regular file' if file.exists() else 'no such file'}")
    return [file]


def _split_files(folder: Path, split: str) -> list[Path]:
    if not folder.is_dir():
        what = "is not a folder, so that it has no split" if folder.exists() else "no such folder to take split"
        raise ValueError(f"{folder}: {what} {split!r}")
    found = [folder / f"{split}{ending}" for ending in READERS if (folder / f"{split}{ending}").is_file()]
    pieces = [] if found else _pieces(folder, split)
    if pieces:
        return pieces
    if len(found) != 1:
        wanted = ", ".join(f"{split}{ending}" for ending in ENDINGS)
        have = f"has {' and '.join(file.name for file in found)}" if found else f"has none of {wanted}"
        raise ValueError(f"{folder}: split {split!r} must be one file; the folder {have}")
    return found


def _pieces(folder: Path, split: str) -> list[Path]:
    """The files split-00000-of-00002.… in order, all of them or none."""
    pattern = re.compile(rf"{re.escape(split)}-(\d{{5}})-of-(\d{{5}})\.\w+(\.gz)?", re.ASCII)
    found = sorted(file for file in folder.iterdir() if pattern.fullmatch(file.name) and _ending(file) in READERS)
    numbers = [re.findall(r"\d{5}", file.name)[-2:] for file in found]
    if numbers and numbers != [[f"{i:05}", f"{len(found):05}"] for i in range(len(found))]:
        raise ValueError(
            f"{folder}: pieces of split {split!r} are missing or double: found {names(f.name for f in found)}"
        )
    return found


def _read_jsonl(file: Path) -> list[Row]:
    rows = []
    for number, line in _lines(file):
        if line.strip():
            rows.append(_object(_parse(line, f"{file}: line {number}"), f"{file}: line {number}"))
    return rows


def _read_json(file: Path) -> list[Row]:
    rows = _parse(_whole(file), str(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file}: must be a list of objects, found {kind_of(rows)}; one object a line is .jsonl")
    return [_object(row, f"{file}: row {number}") for number, row in enumerate(rows, start=1)]


def _read_txt(file: Path) -> list[Row]:
    return [{"text": _whole(file)}]


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
    if (name := twice(header)) is not None:
        raise ValueError(f"{file}: line {reader.line_num}: column {names([name], repr)} stands twice in the header")
    rows = []
    for record in reader:
        if record and len(record) != len(header):
            raise ValueError(
                f"{file}: line {reader.line_num}: {len(record)} values for the {len(header)} columns of the header"
            )
        if record:
            rows.append(dict(zip(header, record, strict=True)))
    return rows


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": read_parquet,
    ".txt": _read_txt,
    ".jsonl.gz": _read_jsonl,
    ".json.gz": _read_json,
    ".csv.gz": _read_csv,
    ".txt.gz": _read_txt,
}
ENDINGS = [ending for ending in READERS if not ending.endswith(".gz")]


def _whole(file: Path) -> str:
    """The text of a file that is read at once."""
    if (size := file.stat().st_size) > MAX_JSON_BYTES:
        ending = _ending(file)
        instead = "use .jsonl" if ".json" in ending else "cut it into several files"
        raise ValueError(f"{file}: {size:,} bytes of {ending} are read at once, at most {MAX_JSON_BYTES:,}; {instead}")
    return "".join(line for _, line in _lines(file))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line with its end) of a UTF-8 text file."""
    with _open(file) as handle:
        number = unpacked = 0
        while line := _read_line(handle, f"{file}: line {number + 1}"):
            number += 1
            unpacked += len(line)
            if number == 1:
                line = _without_bom(line, file)
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{file}: line {number}: longer than {MAX_LINE_BYTES:,} bytes, so hardly a text file")
            if unpacked > MAX_UNPACKED_BYTES and file.suffix.lower() == ".gz":
                raise ValueError(f"{file}: line {number}: unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
            if b"\0" in line:
                raise ValueError(f"{file}: line {number}: byte {line.index(0) + 1} is NUL, so this is no text file")
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}: line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8"
                ) from error


def _open(file: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")


def _read_line(handle: BinaryIO | gzip.GzipFile, where: str) -> bytes:
    try:
        return handle.readline(MAX_LINE_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{where}: the gzip file is damaged or cut short: {error}") from error


def _without_bom(line: bytes, file: Path) -> bytes:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{file}: line 1: this is UTF-16; save the file as UTF-8")
    return line.removeprefix(codecs.BOM_UTF8)


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text.strip() else f"line {error.lineno}, column {error.colno}"
        hint = "; one object a line is .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{where}: not JSON: {error.msg} at {place}{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not read: nested too deep") from error
    except ValueError as error:  # ours, or a number of more digits than Python reads
        raise ValueError(f"{where}: not read: {' '.join(str(error).split())}") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper_than(MAX_DEPTH, value):
        raise ValueError(f"{where}: not read: nested too deep (more than {MAX_DEPTH} lists and objects in one another)")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"key {names([twice(key for key, _ in pairs)], repr)} stands twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number; null says that there is none")


def _deeper_than(depth: int, value: Any) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [child for item in level for child in _children(item)]
    return bool(level)


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object with named columns, found {kind_of(value)}")
    return value

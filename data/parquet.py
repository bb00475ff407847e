"""Parquet files, read with pyarrow (the extra `parquet`): columns become the values that JSON would hold.

Lists and structs become lists and dicts; what JSON has no type for (dates, decimals, bytes) stays as Python's object
and is refused, by name, if it is used as text. A parquet file is compressed, so a small one can hold a great deal:
rows and bytes are counted while it is read, and what the file says of itself is checked before.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .columns import names, twice

MAX_ROWS = 10_000_000
MAX_BYTES = 4 * 2**30
BATCH_ROWS = 1000


def read_parquet(file: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file.

    Raises ValueError when pyarrow is not installed, when the file is damaged or too large, when two columns have one
    name, and when a value is not readable (text that is not UTF-8), naming the column and the rows.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: reading .parquet needs pyarrow: pip install 'pyarrow>=16'") from None
    rows: list[dict[str, Any]] = []
    size = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as source:
            _check(source, file)
            for batch in source.iter_batches(batch_size=BATCH_ROWS):
                size += batch.nbytes
                if size > MAX_BYTES or len(rows) + batch.num_rows > MAX_ROWS:
                    raise _Refused(f"{file}: holds more than {MAX_ROWS:,} rows or {MAX_BYTES:,} bytes; split it")
                rows += _batch_rows(batch, f"{file}: rows {len(rows) + 1} to {len(rows) + batch.num_rows}")
    except _Refused as refusal:
        raise ValueError(str(refusal)) from refusal.__cause__
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file}: not readable as parquet: {_one_line(error)}") from error
    return rows


class _Refused(Exception):
    """What we refuse, apart from what pyarrow does."""


def _check(source: Any, file: Path) -> None:
    if (name := twice(source.schema_arrow.names)) is not None:
        raise _Refused(f"{file}: column {names([name], repr)} stands twice")
    metadata = source.metadata
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if metadata.num_rows > MAX_ROWS or size > MAX_BYTES:
        raise _Refused(
            f"{file}: says that it holds {metadata.num_rows:,} rows and {size:,} bytes; "
            f"at most {MAX_ROWS:,} and {MAX_BYTES:,} are read at once; split it"
        )


def _batch_rows(batch: Any, where: str) -> Iterator[dict[str, Any]]:
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError as error:
            raise _Refused(f"{where}: column {names([name], repr)} holds text that is not UTF-8") from error
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _Refused(f"{where}: column {names([name], repr)} is not readable: {_one_line(error)}") from error
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"

"""Write the README's measured tables from benchmarks/results/*.csv, between the comments that mark their places.

    <!-- table: train_step -->  …  <!-- end of table -->

A cell is a CSV column under a heading, perhaps in another unit. `python benchmarks/tables.py` rewrites README.md; the
tests check that the README says what the CSV files say.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import RESULTS, read_rows  # noqa: E402  # after the path

Row = dict[str, str]
Column = Callable[[Row], str]


def gigabytes(column: str) -> Column:
    return lambda row: f"{int(row[column]) / 1e9:.2f} GB"


def rounded(column: str) -> Column:
    return lambda row: f"{float(row[column]):.0f}"


def plain(column: str) -> Column:
    return lambda row: row[column]


def fixed(column: str, digits: int) -> Column:
    return lambda row: f"{float(row[column]):.{digits}f}"


TABLES: dict[str, dict[str, Column]] = {
    "train_step": {
        "QLoRA step": plain("arm"),
        "dtype": plain("dtype"),
        "checkpointing": lambda row: "yes" if row["checkpointed"] == "True" else "no",
        "tokens/s": rounded("tokens_per_second"),
        "speed ×": plain("speed_ratio"),
        "peak memory": gigabytes("peak_process_bytes"),
        "memory ×": plain("memory_ratio"),
        "live tensors": gigabytes("live_tensor_bytes"),
    },
    "paging": {
        "AdamW step": lambda row: row["arm"] + (f", {row['state_bits']}-bit" if row["share"] else ""),
        "MB moved": lambda row: f"{int(row['bytes_moved']) / 1e6:.0f}" if row["share"] else "",
        "ms (20 %, median, 80 %)": lambda row: f"{row['p20_ms']}, {row['p50_ms']}, {row['p80_ms']}",
        "model, ms": lambda row: row["model_ms"],
        "× torch fused": lambda row: row["ratio"],
    },
    "matmul": {
        "product": lambda row: f"{row['passes']}, M = {row['M']}",
        "by": plain("arm"),
        "ms": fixed("p50_ms", 1),
        "time ×": fixed("ratio", 2),
    },
    "dequantize": {"dequantize": plain("arm"), "ms": fixed("p50_ms", 1), "time ×": fixed("ratio", 2)},
    "quantize": {"quantize": plain("arm"), "ms": fixed("p50_ms", 1), "time ×": fixed("ratio", 2)},
    "decode": {
        "greedy decoding": plain("arm"),
        "batch": plain("batch"),
        "tokens/s": rounded("tokens_per_second"),
        "speed ×": plain("ratio"),
        "× in fp32": plain("ratio_fp32"),
        "first token, ms": plain("prefill_ms"),
        "equal completions": lambda row: "" if "adapter" in row["arm"] else f"{row['same']} of {row['batch']}",
    },
    "packing": {
        "rows": plain("rows"),
        "batches": plain("arm"),
        "padding": lambda row: f"{float(row['padding']):.0%}",
        "learnt tokens/s": rounded("learnt_tokens_per_second"),
        "speed ×": plain("ratio"),
    },
}


def markdown(name: str, rows: list[Row]) -> str:
    """The table of one benchmark, and what it was measured on."""
    columns = TABLES[name]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    names = {"machine": "", "backend": "", "torch": "torch ", "peer_versions": "", "commit": "commit "}
    measured = {", ".join(name + row[fact] for fact, name in names.items() if row.get(fact)) for row in rows}
    return "\n".join([*lines, "", f"Measured on: {'; '.join(sorted(measured))}.", ""])


def with_tables(text: str) -> str:
    """`text` with every marked place filled from its CSV. Raises ValueError for a mark that names no table."""

    def table(mark: re.Match[str]) -> str:
        name = mark.group(1)
        if name not in TABLES:
            raise ValueError(f"the mark {mark.group(0).splitlines()[0]} names no table; there are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{markdown(name, read_rows(RESULTS / f'{name}.csv'))}<!-- end of table -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")

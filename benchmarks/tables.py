"""Write the README's measured tables from benchmarks/results/*.csv, between the comments that mark their places.

    <!-- table: train_step -->  …  <!-- end of table -->

A cell is a CSV column under a heading, perhaps in another unit. `python -m benchmarks.tables` rewrites README.md; the
tests check that the README says what the CSV files say.
"""

import re
from collections.abc import Callable

from benchmarks.results import RESULTS, read_rows
from kernels.compile_check import NOTE

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
        "× model": lambda row: f"{float(row['p50_ms']) / float(row['model_ms']):.2f}" if row["share"] else "",
        "apart, ms": lambda row: row["apart_ms"],
        "× torch fused": lambda row: row["ratio"],
    },
    "matmul": {
        "product": lambda row: f"{row['passes']}, M = {row['M']}",
        "by": plain("arm"),
        "ms": fixed("p50_ms", 1),
        "time ×": fixed("ratio", 2),
    },
    "lora_matmul": {
        "LoRA layer": lambda row: f"{row['N']} × {row['K']}, {row['passes']}, M = {row['M']}",
        "by": plain("arm"),
        "ms": fixed("p50_ms", 1),
        "time ×": fixed("ratio", 2),
    },
    "linear_cross_entropy": {
        "last layer and loss": lambda row: f"{row['passes']}, M = {row['M']}",
        "by": plain("arm"),
        "ms": fixed("p50_ms", 0),
        "time ×": fixed("ratio", 2),
        "memory of the call": lambda row: f"{int(row['peak_extra_bytes']) / 1e6:.0f} MB",
    },
    "dequantize": {"dequantize": plain("arm"), "ms": fixed("p50_ms", 1), "time ×": fixed("ratio", 2)},
    "quantize": {"quantize": plain("arm"), "ms": fixed("p50_ms", 1), "time ×": fixed("ratio", 2)},
    "decode": {
        "greedy decoding": plain("arm"),
        "batch": plain("batch"),
        "tokens/s": rounded("tokens_per_second"),
        "speed ×": plain("ratio"),
        "× in fp32": plain("ratio_fp32"),
        "× llama.cpp": lambda row: row.get("ratio_llama", ""),
        "first token, ms": plain("prefill_ms"),
        "equal completions": lambda row: (
            "" if "adapter" in row["arm"] or row["arm"] == "llama.cpp" else f"{row['same']} of {row['batch']}"
        ),
    },
    "grpo": {
        "GRPO iteration": plain("arm"),
        "completions a forward": plain("completions_a_forward"),
        "seconds": fixed("seconds", 1),
        "time ×": fixed("time_ratio", 2),
        "peak memory": gigabytes("peak_process_bytes"),
        "memory ×": fixed("memory_ratio", 2),
        "time × (64)": fixed("time_ratio_whole", 2),
        "memory × (64)": fixed("memory_ratio_whole", 2),
    },
    "distill": {
        "student": plain("student"),
        "layers": lambda row: row["layers"] if row["student"] != "(the teacher)" else "",
        "steps": lambda row: row["steps"] if int(row["seconds"]) else "0",
        "held-out loss": plain("loss"),
        "held-out KL to the teacher": plain("kl"),
        "seconds": lambda row: row["seconds"] if int(row["seconds"]) else "",
    },
    "packing": {
        "rows": plain("rows"),
        "batches": plain("arm"),
        "padding": lambda row: f"{float(row['padding']):.0%}",
        "learnt tokens/s": rounded("learnt_tokens_per_second"),
        "speed ×": plain("ratio"),
    },
}


KERNELS = {
    "dequantize": ("dequantize words", r"dequantize"),
    "y = x · Ŵᵀ, M = 1": ("decode", r"forward simt M=1"),
    "y = x · Ŵᵀ, other M": ("forward", r"forward \d.*"),
    "the same with LoRA": ("forward lora", None),
    "dx = dy · Ŵ": ("backward", None),
    "the same with LoRA, dx": ("backward lora", None),
}
"""What is computed → our kernel in compile.csv, and which of bitsandbytes' (its config there)."""
GPUS = {
    "sm_75": "T4",
    "sm_80": "A100",
    "sm_86": "A10",
    "sm_89": "L4",
    "sm_90": "H100",
    "sm_100": "B200",
    "sm_120": "5090",
}


def compile_table(rows: list[Row]) -> list[str]:
    """Lowest and highest count over the tiles of each kernel, by GPU; - where there is no such kernel or no count."""
    heads = ["instructions a weight", "by", *(f"{gpu} ({name})" for gpu, name in GPUS.items())]
    peer = next((row["kernel"] for row in rows if row["kernel"].startswith("bitsandbytes")), "bitsandbytes")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for what, (ours, theirs) in KERNELS.items():
        mine = [row for row in rows if row["kernel"] == ours]
        other = [row for row in rows if theirs and row["kernel"] == peer and re.fullmatch(theirs, row["config"])]
        for by, found in (("ours", mine), (peer, other))[: 2 if theirs else 1]:
            lines.append("| " + " | ".join([what, by, *(counts(found, gpu) for gpu in GPUS)]) + " |")
    return lines


def counts(rows: list[Row], target: str) -> str:
    found = sorted(float(row["per_weight"]) for row in rows if row["target"] == target and row["per_weight"])
    return "-" if not found else " to ".join(dict.fromkeys(f"{count:.1f}" for count in (found[0], found[-1])))


def markdown(name: str, rows: list[Row]) -> str:
    """The table of one benchmark, and what it was measured on."""
    if name == "compile":
        return "\n".join([*compile_table(rows), "", f"{NOTE}\n"])
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
        if name not in (*TABLES, "compile"):
            there_are = ", ".join([*TABLES, "compile"])
            raise ValueError(f"the mark {mark.group(0).splitlines()[0]} names no table; there are {there_are}")
        return f"<!-- table: {name} -->\n{markdown(name, read_rows(RESULTS / f'{name}.csv'))}<!-- end of table -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = RESULTS.parent.parent / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")

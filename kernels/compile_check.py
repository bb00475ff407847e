"""compile_check: every Triton kernel and tile shape, compiled for GPUs that are not here, and what came of it.

    python -m kernels.compile_check --targets 80 90        or        qlora bench compile

Registers, spills, stack, shared memory and tensor instructions of each, and the instructions of the main loop for each
weight that it looks up. These are counts of instructions and limits of the hardware, NOT speeds: they say what a
kernel cannot beat (a multiprocessor issues 128 lane-instructions a clock) and whether it fits, nothing of stalls.

Each target has a process of its own: a compiler that crashes costs a row, and the next process goes on behind it.
Where bitsandbytes with its CUDA libraries is installed, its kernels for the same GPUs are disassembled beside ours.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

TARGETS = (75, 80, 86, 89, 90, 100, 120, 942)  # 942: AMD's gfx942
NOTE = "Instruction counts and hardware limits of compiled code, for GPUs that were not there: not speeds."


@dataclass(frozen=True)
class Row:
    """What one kernel became on one target. Sizes in bytes; `per_weight` and `pipes` count the main loop."""

    target: str
    kernel: str
    config: str
    status: str
    """ok, or why there is no kernel"""
    registers: int = 0
    spills: int = 0
    """loads and stores of registers to local memory"""
    stack: int = 0
    shared: int = 0
    tensor: int = 0
    """tensor-core instructions, in all of the kernel"""
    per_weight: float | None = None
    pipes: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the table, and write it as CSV if asked. 1 when a kernel crashed its compiler or spills."""
    parser = argparse.ArgumentParser(prog="qlora bench compile", description=NOTE)
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--only", default="", help="a regular expression: kernels whose name and tile it is found in")
    parser.add_argument("--csv", type=Path, help="write the rows there too")
    parser.add_argument("--no-peer", action="store_true", help="leave bitsandbytes out")
    parser.add_argument("--worker", type=int, metavar="FIRST", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker is not None:
        return _work(options.targets[0], options.only, options.worker)
    rows = [row for target in options.targets for row in check(target, options.only)]
    if not options.no_peer:
        from .compile_peer import peer_rows

        rows += peer_rows(options.targets)
    print("\n".join(render(rows)))
    if options.csv:
        write_csv(rows, options.csv)
    return int(
        any(row.spills or not row.status.startswith("ok") for row in rows if not row.kernel.startswith("bitsandbytes"))
    )


def check(target: int, only: str = "") -> list[Row]:
    """Compile all cases of a target in processes of their own. A crash is a row."""
    from .compile_cases import cases

    names = [(case.name, str(case.config)) for case in cases(target, only)]
    rows: list[Row] = []
    while len(rows) < len(names):
        command = [sys.executable, "-m", "kernels.compile_check", "--targets", str(target), "--only", only]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        root = Path(__file__).parent.parent
        done = subprocess.run(
            [*command, "--worker", str(len(rows))], capture_output=True, text=True, cwd=root, env=environment
        )
        rows += [Row(**json.loads(line[4:])) for line in done.stdout.splitlines() if line.startswith("ROW ")]
        if len(rows) < len(names):
            reason = (done.stderr.strip().splitlines() or ["no message"])[0][:100]
            rows.append(Row(target_name(target), *names[len(rows)], f"the compiler ended: {reason}"))
    return rows


def _work(target: int, only: str, first: int) -> int:
    """In the worker: compile the cases from number `first` on, a line each."""
    from .compile_cases import cases

    for case in list(cases(target, only))[first:]:
        print("ROW " + json.dumps(asdict(case.compile(target))), flush=True)
    return 0


def target_name(target: int) -> str:
    return "gfx942" if target == 942 else f"sm_{target}"


def render(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as lines of a table."""
    head = [field.name for field in fields(Row)]
    cells = [[_cell(getattr(row, name)) for name in head] for row in rows]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    for line in [head, *cells]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    yield NOTE


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Written beside `path` and renamed."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    os.replace(aside, path)


if __name__ == "__main__":
    sys.exit(main())

"""The last layer and its loss: ours, and F.cross_entropy on the logits of all rows, in time and in memory.

    forward                                 nll of M rows over V words
    forward and backward                    and the gradient of the hidden states: the head is frozen, as LoRA has it
    forward and backward, trained head      and the head's, as full fine-tuning has it

"ours, 4-bit" takes the head in NF4, which only a frozen head can be. Times come from turns in one process. Memory comes
from a process for each arm: how far one call raises the resident size, inputs and libraries being there (Linux only).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from benchmarks.common import DTYPES, check_accuracy, parser, rows_of, shapes_of, take_turns
from benchmarks.results import write_rows
from quant import QuantizedTensor

BASE, OURS, FOUR_BIT = "torch F.cross_entropy", "ours", "ours, 4-bit"
GATED_ROWS = 192
FORWARD, FROZEN, TRAINED = "forward", "forward and backward", "forward and backward, trained head"


def main() -> None:
    flags = parser(__doc__ or "", shapes="49152x576")  # SmolLM2's head
    flags.add_argument("--rows", default="1024", help="M: rows of hidden states")
    flags.add_argument("--passes", nargs="+", default=[FORWARD, FROZEN, TRAINED], choices=(FORWARD, FROZEN, TRAINED))
    flags.add_argument("--arm", help="internal: one arm's memory, in this process")
    args = flags.parse_args()
    if args.arm:
        print(memory_here(*json.loads(args.arm)))
        return
    rows = []
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("bench linear_cross_entropy reads peak memory as Linux counts it: it needs Linux")
    for V, D in shapes_of(args.shapes):
        for M in map(int, args.rows.split(",")):
            for passes in args.passes:
                names = [BASE, OURS, *([FOUR_BIT] if passes != TRAINED else [])]
                for name in names[1:]:
                    gate(name, passes, M, V, D, args.dtype)
                times = take_turns({name: call_of(name, passes, M, V, D, args.dtype) for name in names}, args.rounds)
                found = rows_of({"M": M, "V": V, "D": D, "dtype": args.dtype, "passes": passes}, times, BASE, ())
                for row in found:
                    row["peak_extra_bytes"] = memory_of(row["arm"], passes, M, V, D, args.dtype)
                rows += found
    write_rows("linear_cross_entropy", rows, key="key")


def call_of(arm: str, passes: str, M: int, V: int, D: int, dtype: str) -> Callable[[], tuple[Tensor, ...]]:
    """The arm on its inputs, which are equal for all arms."""
    hidden, head, targets = inputs(M, V, D, dtype)
    nll_of = full_logits if arm == BASE else kernels.linear_cross_entropy
    return losses(nll_of, hidden, kernels.quantize(head) if arm == FOUR_BIT else head, targets, passes)


def losses(
    nll_of: Callable[..., Tensor], hidden: Tensor, head: Tensor | QuantizedTensor, targets: Tensor, passes: str
) -> Callable[[], tuple[Tensor, ...]]:
    """nll, and the gradients of its mean that `passes` asks for."""
    leaves = [] if passes == FORWARD else [hidden.requires_grad_()]
    if passes == TRAINED and isinstance(head, Tensor):
        leaves.append(head.requires_grad_())

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(bool(leaves)):
            nll = nll_of(hidden, head, targets)
        return nll, *(torch.autograd.grad(nll.mean(), leaves) if leaves else ())

    return run


def inputs(M: int, V: int, D: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (M, D), head (V, D), targets (M,); logits are of the size of 1."""
    seeded = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=seeded).to(DTYPES[dtype])
    head = (torch.randn(V, D, generator=seeded) / D**0.5).to(DTYPES[dtype])
    return hidden, head, torch.randint(V, (M,), generator=seeded)


def full_logits(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def gate(arm: str, passes: str, M: int, V: int, D: int, dtype: str) -> None:
    """Ours must be as accurate as torch's in the loss and in every gradient, on the first rows."""
    M = min(M, GATED_ROWS)
    hidden, head, targets = inputs(M, V, D, dtype)
    if arm == FOUR_BIT:
        head = kernels.dequantize(kernels.quantize(head))
    plain = losses(full_logits, hidden, head, targets, passes)()
    exact = losses(full_logits, hidden.double(), head.double(), targets, passes)()
    ours = call_of(arm, passes, M, V, D, dtype)()
    for what, mine, theirs, value in zip(("nll", "dx", "dW"), ours, plain, exact, strict=False):
        check_accuracy(mine, theirs, value.detach(), f"{arm}, {passes}: {what} of {M} rows over {V} words")


def memory_of(*arm: Any) -> int:
    """Peak memory of one call, measured in a process of its own."""
    command = [sys.executable, __file__, "--arm", json.dumps(arm)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{arm} ended with exit code {done.returncode}: {done.stderr}")
    return int(done.stdout.split()[-1])


def memory_here(arm: str, passes: str, M: int, V: int, D: int, dtype: str) -> int:
    call_of(arm, passes, 1, 64, D, dtype)()  # loads what is loaded at the first call
    run = call_of(arm, passes, M, V, D, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is resident now
    before = peak_resident_bytes()
    run()
    return peak_resident_bytes() - before


def peak_resident_bytes() -> int:
    """Since the last reset. getrusage does not do: a process inherits the peak of the one that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()

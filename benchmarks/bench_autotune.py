"""qlora bench autotune: what autotune measured on this machine's GPUs and keeps, and where it changes over.

For each product: the largest M at which a fused kernel was the fastest, and at which M dequantize + torch.matmul was.
`-- --all` lists the time of every candidate. Nothing is timed here: `make gpu-bench`, or use, does that.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--all", action="store_true", help="every candidate's milliseconds too")
    args = flags.parse_args()
    try:
        from kernels.triton import autotune
    except ImportError:
        print("bench autotune: Triton is not installed (it is for Linux)", file=sys.stderr)
        return 2
    path = autotune.kept_in()
    autotune.read_kept(path)
    rows = autotune.crossovers()
    if not rows:
        print(f"nothing was measured by this version of the kernels yet: there is no {path.name} in the cache")
        return 0
    table = Table(*rows[0], title="fused kernel, or dequantize + torch.matmul")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    if args.all:
        print("\n".join(autotune.table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

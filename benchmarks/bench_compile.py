"""qlora bench compile: every Triton kernel compiled for GPUs that are not here, beside bitsandbytes' shipped ones.

Counts and limits, not speeds. Flags after two dashes: qlora bench compile -- --targets 80 90 --csv FILE.
"""

import sys

from kernels.compile_check import main

if __name__ == "__main__":
    sys.exit(main())

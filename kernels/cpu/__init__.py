"""kernels/cpu: the quantized operations in plain C, for x86 (AVX-512, AVX2) and everything else (portable).

    kernels.c        the C, compiled once for each instruction set; cpuid.c: which of them this processor runs
    simd.h           the few things that differ between vector units
    storage.h        a quantized weight, and rows of numbers, in C
    quantize.h       quantize and dequantize
    adamw.h          the optimizer's step, with 32-bit and 8-bit state
    adamw_pages.h    the same on state in pages of a file
    product.h        what a product takes, and its workspace
    matmul_large.h   products of many rows: the weight is decoded a tile at a time
    matmul_small.h   products of 1 to 8 rows: the weight is decoded into registers
    dense.h          a few rows under a dense weight as it lies: the head in decoding
    low_rank.h       an adapter's products with few columns or few rows
    elementwise.h    RMSNorm, SwiGLU, rope and the loss's softmax in one pass
    attention.h      causal attention over whole rows, forward and backward
    decode.h         all layers of a decoder for one new token a row
    build.py         compiles them into a cache
    maps.py          the tables by which quantize.h finds a level
    library.py       calls them
    operations.py    registers them as backend "cpu"
    adamw.py         registers the optimizer's step
    adamw_pages.py   registers it for pages
    decode.py        calls decode.h
    attention.py     calls attention.h
    dense.py         calls dense.h
    elementwise.py   calls elementwise.h
    lora.py          base and low-rank terms in one product

Importing this registers the backend. Nothing is compiled before the first call.
"""

from . import adamw, adamw_pages, lora, operations

__all__ = ["adamw", "adamw_pages", "lora", "operations"]

"""Exercise 5: a Triton kernel in the interpreter, against quant.dequantize to the bit."""

import torch
from torch import Tensor

from lessons.grading import Case, Forbidden, Mistake
from quant import QuantizedTensor, dequantize, nf4_codebook, quantize
from quant.blockwise import unpack

TITLE = "a Triton kernel that dequantizes NF4"
VERSION = 1
MUST_NOT_USE = (
    *(Forbidden(name, "the kernel does the arithmetic") for name in ("quant", "kernels")),
    *(Forbidden(name, "the kernel repeats nothing: it loads") for name in (".repeat_interleave", ".index_select")),
)

SWAPPED = "the two weights of each byte are swapped: the high nibble (codes >> 4) is the first, at 2 · byte"
HALVES = "the high nibbles fill the first half and the low ones the second: those of byte j belong to 2j and 2j + 1"
BYTE_SCALE = "absmax was looked up at byte // BLOCKSIZE: a block is BLOCKSIZE weights, which are half as many bytes"
ONE_SCALE = "every weight got the first absmax: weight i has absmax[i // BLOCKSIZE]"
UNSCALED = "the levels were not multiplied by absmax"
PROGRAM_0 = "each program did the work of program 0: its bytes begin at tl.program_id(0) * BYTES"
UNWRITTEN = "some weights were not written: NaN is left where the kernel stored nothing"


def mistakes(q: QuantizedTensor, n: int) -> list[Mistake]:
    assert q.absmax is not None
    indices = unpack(q.packed, 2 * len(q.packed)).int()
    levels, at = nf4_codebook()[indices], torch.arange(2 * len(q.packed))
    pairs = levels.view(-1, 2)
    scale = q.absmax[(at // q.blocksize).clamp(max=q.n_blocks - 1)]
    values: list[tuple[str, Tensor]] = [
        (SWAPPED, pairs.flip(1).reshape(-1) * scale),
        (HALVES, pairs.T.reshape(-1) * scale),
        (BYTE_SCALE, levels * q.absmax[at // 2 // q.blocksize]),
        (ONE_SCALE, levels * q.absmax[0]),
        (UNSCALED, levels),
    ]
    found = [Mistake(hint, value[:n]) for hint, value in values]
    right = dequantize(q)

    def program_0(got: Tensor) -> bool:
        """The weights of the first 64 bytes alone are there."""
        return n > 128 and torch.equal(got[:2], right[:2]) and bool(got[128:].isnan().all())

    return [*found, Mistake(PROGRAM_0, program_0), Mistake(UNWRITTEN, lambda got: bool(got.isnan().any()))]


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for name, n, blocksize in [
        ("one block, half a program", 64, 64),
        ("one program, four blocks of 32", 128, 32),
        ("five programs, blocks of 32", 640, 32),
        ("a tail: 1000 weights", 1000, 64),
        ("an odd number: 333 weights in blocks of 128", 333, 128),
        ("one weight", 1, 64),
    ]:
        q = quantize(torch.randn(n, generator=generator), blocksize=blocksize, double_quant=False)
        arguments = (q.packed, q.code, q.absmax, n, blocksize)
        found.append(
            Case(
                name,
                lambda student, arguments=arguments: student("dequantize_nf4", *arguments),
                dequantize(q),
                mistakes(q, n),
            )
        )
    return found

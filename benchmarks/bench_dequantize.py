"""dequantize: ours, the reference, and bitsandbytes, beside a copy of the output, which is the least it can cost.

All write a fresh tensor; ours also writes into an old one ("ours, out="), as the copy does.
"""

import torch

import kernels
import quant
from benchmarks.common import DTYPES, bnb_weight, parser, rows_of, shapes_of, take_turns
from benchmarks.results import write_rows


def main() -> None:
    args = parser(__doc__ or "", shapes="4096x4096,1536x576").parse_args()
    dtype = DTYPES[args.dtype]
    rows = []
    for N, K in shapes_of(args.shapes):
        q = kernels.quantize(torch.randn(N, K), double_quant=not args.no_double_quant)
        weight = quant.dequantize(q, dtype)
        if not torch.equal(kernels.dequantize(q, dtype), weight):
            raise ValueError(f"dequantize {N}x{K} differs from the definition")
        out = torch.empty_like(weight)
        arms = {
            "copy": lambda out=out, weight=weight: out.copy_(weight),
            "ours, out=": lambda q=q, out=out: kernels.dequantize(q, out=out),
            "ours": lambda q=q: kernels.dequantize(q, dtype),
            "reference": lambda q=q: with_reference(q, dtype),
        }
        if not args.no_peer:
            from bitsandbytes import functional

            packed, state = bnb_weight(q)
            state.dtype = dtype
            arms["bitsandbytes"] = lambda packed=packed, state=state: functional.dequantize_4bit(packed, state)
        case = {"N": N, "K": K, "dtype": args.dtype, "double_quant": q.double_quant}
        rows += rows_of(case, take_turns(arms, args.rounds), "copy")
    write_rows("dequantize", rows, key="key")


def with_reference(q: quant.QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    with kernels.use_backend("reference"):
        return kernels.dequantize(q, dtype)


if __name__ == "__main__":
    main()

"""quantize, both levels: ours and the reference, beside bitsandbytes."""

import torch

import kernels
import quant
from benchmarks.common import DTYPES, parser, rows_of, shapes_of, take_turns
from benchmarks.results import write_rows


def main() -> None:
    args = parser(__doc__ or "", shapes="4096x4096,1536x576").parse_args()
    double_quant = not args.no_double_quant
    rows = []
    for N, K in shapes_of(args.shapes):
        weight = torch.randn(N, K).to(DTYPES[args.dtype])
        ours, definition = (f(weight, double_quant=double_quant) for f in (kernels.quantize, quant.quantize))
        if any(not torch.equal(t, ours.tensors()[name]) for name, t in definition.tensors().items()):
            raise ValueError(f"quantize {N}x{K} differs from the definition")
        arms = {
            "ours": lambda weight=weight: kernels.quantize(weight, double_quant=double_quant),
            "reference": lambda weight=weight: quant.quantize(weight, double_quant=double_quant),
        }
        base = "reference"
        if not args.no_peer:
            from bitsandbytes import functional

            base = "bitsandbytes"
            arms[base] = lambda weight=weight: functional.quantize_4bit(
                weight, quant_type="nf4", blocksize=64, compress_statistics=double_quant
            )
        case = {"N": N, "K": K, "dtype": args.dtype, "double_quant": double_quant}
        rows += rows_of(case, take_turns(arms, args.rounds), base)
    write_rows("quantize", rows, key="key")


if __name__ == "__main__":
    main()

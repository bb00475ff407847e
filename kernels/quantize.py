"""quantize: float weight → QuantizedTensor. Every backend must equal quant.quantize to the bit."""

from torch import Tensor

import quant

from .dispatch import backend_for, implementation, register

FOUR_BIT_TYPES = ("nf4", "fp4", "int4")  # what the C and Triton kernels serve

register("quantize", "reference")(quant.quantize)


def quantize(
    weight: Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> quant.QuantizedTensor:
    """quant.quantize on the backend of weight's device: same arguments, results and errors."""
    run = implementation("quantize", backend_for("quantize", weight.device, weight, quant_type))
    return run(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)

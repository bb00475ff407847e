"""quant: the mathematics of 4-bit storage, in plain PyTorch. This room is the definition; kernels/ must equal it.

weight ──blockwise──▶ codes + absmax ──pack──▶ two codes a byte
                          absmax ──double_quant──▶ 8-bit codes + absmax2 + offset
"""

from .blockwise import BLOCKSIZES, dequantize, quantize
from .bnb_format import from_bnb_state_dict, to_bnb_state_dict
from .codebook import codebook, dynamic_map, fp4_codebook, int4_codebook, nf4_codebook, nfk_codebook
from .tensor import QuantizedTensor

__all__ = [
    "BLOCKSIZES",
    "QuantizedTensor",
    "codebook",
    "dequantize",
    "dynamic_map",
    "fp4_codebook",
    "from_bnb_state_dict",
    "int4_codebook",
    "nf4_codebook",
    "nfk_codebook",
    "quantize",
    "to_bnb_state_dict",
]

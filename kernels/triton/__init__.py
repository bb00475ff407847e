"""The Triton kernels. Importing this registers them as backend "triton"; kernels/__init__.py does so where triton is.

    lookup.py           two codes in a byte → two weights, and the scales of both levels
    dequantize.py       the whole weight at once
    matmul_kernels.py   x · Ŵᵀ and dy · Ŵ, with LoRA in the accumulator; matmul.py launches them
    lora_matmul.py      the fused layer and its gradients
    quantize.py         nearest code of each weight
    linear_cross_entropy.py   output layer and loss
    adamw.py            the optimizer's step, 32-bit and 8-bit state
    configs.py, autotune.py   tile shapes by GPU, and which is fastest
    launch.py           a weight as kernel arguments

They run on GPU tensors, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported).
"""

from ..dispatch import register_backend
from . import adamw, dequantize, linear_cross_entropy, lora_matmul, matmul, quantize
from .launch import describe, why_missing

__all__ = ["adamw", "dequantize", "linear_cross_entropy", "lora_matmul", "matmul", "quantize"]

register_backend("triton", why_missing, describe)

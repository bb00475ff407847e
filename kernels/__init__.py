"""kernels: the quantized operations, fast. What each one means is in quant/; who runs it is decided in dispatch.py.

One file per operation, with its `reference` (plain PyTorch, any device). The C kernels of the CPU are in cpu/, Triton's
for GPUs in triton/; ops.py has the products as torch.compile sees them. compile_check.py compiles the Triton kernels
for GPUs that are not here, and sass.py reads what came of it.
"""

from importlib.util import find_spec
from pathlib import Path

from . import cpu as _cpu  # noqa: F401  # registers the C kernels
from .dequantize import dequantize
from .dispatch import captured_backend, describe_backends, use_backend
from .divergence import TopK
from .grouped_lora_matmul import Projection, grouped_lora_matmul
from .linear_cross_entropy import Head, linear_cross_entropy
from .linear_distill import linear_distill, linear_top_k
from .lora_matmul import LoRATerm, lora_matmul
from .matmul import linear, matmul
from .quantize import quantize

if find_spec("triton") is not None:  # Linux only
    from . import triton as _triton  # noqa: F401  # registers the Triton kernels

__all__ = [
    "Head",
    "LoRATerm",
    "Projection",
    "TopK",
    "captured_backend",
    "dequantize",
    "describe_backends",
    "grouped_lora_matmul",
    "linear",
    "linear_cross_entropy",
    "linear_distill",
    "linear_top_k",
    "lora_matmul",
    "matmul",
    "quantize",
    "use_backend",
]


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(
        f"{Path(__file__).parent}, this repository's kernels/, has no {name!r}. If Hugging Face's `kernels` package "
        "was meant, it is hidden by this folder: run outside the repository's folder, or uninstall one of the two"
    )

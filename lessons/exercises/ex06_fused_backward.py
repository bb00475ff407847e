"""Exercise 6: forward and backward of a QLoRA layer by hand. Notebook: 06_fused_backward.ipynb. Grade: qlora grade 6"""

from torch import Tensor

from quant import QuantizedTensor, dequantize


def forward(
    x: Tensor, q: QuantizedTensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, saved): y = x · Ŵᵀ + scaling · (x · Aᵀ) · Bᵀ, and the tensors that backward will need.

    x (M, K), q the quantized weight (N, K) with Ŵ = dequantize(q, x.dtype), lora_A (r, K), lora_B (N, r); x, A and B of
    one dtype → y (M, N). saved: a tuple of tensors with M·K + M·r numbers together at most, so never Ŵ.

    Not to be used: the kernels package, autograd.
    """
    # the exercise: this part is the reader's to write, and `qlora grade 6` says so until it is
    raise NotImplementedError("dequantize, multiply, add the adapter; return y and what backward will need")


def backward(
    dy: Tensor, q: QuantizedTensor, lora_A: Tensor, lora_B: Tensor, scaling: float, saved: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx (M, K), dA (r, K), dB (N, r)): the gradients of a loss whose gradient in y is dy (M, N).

    Ŵ is frozen and gets none. It is made again here, from q.

    Not to be used: the kernels package, autograd.
    """
    # the exercise: this part is the reader's to write, and `qlora grade 6` says so until it is
    raise NotImplementedError("dequantize again, then the three products of the chain rule")

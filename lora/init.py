"""How an adapter starts.

Beside the base, which stays as it is (B = 0, so that nothing changes at first):

    kaiming     A uniform in ±1/√K, as PEFT and the LoRA code             gaussian    A ~ N(0, 1/r²)

Or out of the base's weight W (N, K), which keeps the rest: W₀ = W - s · B A, so that nothing changes either:

    pissa       the r largest singular directions (arXiv 2404.02948):  W = U S Vᵀ,  A = √(S_r/s) V_rᵀ,  B = U_r √(S_r/s)
    pissa_niter_4    the same by randomised SVD with 4 power iterations: much faster, not quite exact
    olora       from W = Q R (arXiv 2406.01775):  A = R's first r rows,  B = Q's first r columns

A 4-bit base keeps quantize(W - s · B A). What is trained is then largest, and what is rounded is smaller than W.

    loftq       for a 4-bit base alone (arXiv 2310.08659, algorithm 1): what rounding loses goes into the adapter
                repeat:  Q = quantize(W - L),  L = the r largest singular directions of W - Q
                A = √S_r V_rᵀ,  B = U_r √S_r / s      PEFT leaves out the 1/s, and so asks for alpha = r

The adapter is then no longer the difference to the original: with it off, LoRALinear adds the start, s · B₀A₀, and so
is the original again (up to the rounding of a 4-bit base), which a reference model needs. PEFT gives W₀ alone there.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from quant import QuantizedTensor

PLAIN = ("kaiming", "gaussian")
FROM_WEIGHT = re.compile(r"pissa|pissa_niter_[1-9]\d?|olora|loftq")


def is_known(init: str) -> bool:
    """Whether `init` names a start."""
    return init in PLAIN or takes_from_weight(init)


def takes_from_weight(init: str) -> bool:
    """Whether that start changes the base's weight."""
    return FROM_WEIGHT.fullmatch(init) is not None


@dataclass(frozen=True)
class Start:
    """An adapter's start out of a weight, and what it leaves there."""

    A: Tensor
    """fp32 (r, K)"""
    B: Tensor
    """fp32 (N, r)"""
    base: Tensor | QuantizedTensor
    """W₀ (N, K)"""
    plain_error: float = 0.0
    """‖W - dequantize(quantize(W))‖, Frobenius: what QLoRA starts with. 0 for a dense base."""
    error: float = 0.0
    """‖W - (W₀ + s·BA)‖"""


def draw(A: Tensor, init: str) -> None:
    """Fill A (r, K) with random numbers, in place."""
    if init == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # = uniform ±1/√K


@torch.no_grad()
def start_from_weight(
    weight: Tensor,
    init: str,
    r: int,
    scaling: float,
    quantize: Callable[[Tensor], QuantizedTensor] | None = None,
    *,
    loftq_iterations: int = 1,
) -> Start:
    """weight (N, K), dense, of any floating dtype; with `quantize` the base is 4-bit, else it stays in that dtype.

    r: at most min(N, K). loftq needs `quantize`.
    """
    W = weight.float()
    if init == "loftq":
        assert quantize is not None, "there is no rounding error to take in beside a dense base"
        return _loftq(W, r, scaling, quantize, loftq_iterations)
    A, B = _olora(W, r) if init == "olora" else _pissa(W, r, scaling, init)
    residual = W - scaling * (B @ A)
    if quantize is None:
        return Start(A, B, residual.to(weight.dtype))
    return _measured(W, A, B, scaling, quantize(residual.to(weight.dtype)), quantize)


def _pissa(W: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    if init == "pissa":
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=int(init.removeprefix("pissa_niter_")))
        Vt = V.T
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root


def _olora(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(W)
    return R[:r].contiguous(), Q[:, :r].contiguous()


def _loftq(W: Tensor, r: int, scaling: float, quantize: Callable[[Tensor], QuantizedTensor], iterations: int) -> Start:
    L = torch.zeros_like(W)
    for _ in range(iterations):
        q = quantize(W - L)
        U, S, Vt = torch.linalg.svd(W - kernels.dequantize(q, torch.float32), full_matrices=False)
        root = S[:r].sqrt()
        A, B = root[:, None] * Vt[:r], U[:, :r] * root
        L = B @ A
    return _measured(W, A, B / scaling, scaling, q, quantize)


def _measured(
    W: Tensor, A: Tensor, B: Tensor, scaling: float, q: QuantizedTensor, quantize: Callable[[Tensor], QuantizedTensor]
) -> Start:
    plain = W - kernels.dequantize(quantize(W), torch.float32)
    left = W - kernels.dequantize(q, torch.float32) - scaling * (B @ A)
    return Start(A, B, q, float(plain.norm()), float(left.norm()))


def difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """A' (2r, K) and B' (N, 2r) with B'A' = BA - B₀A₀: the adapter beside the original weight, W = W₀ + s·B₀A₀.

    W₀ + s·BA = W + s·(BA - B₀A₀). What PEFT calls path_initial_model_for_weight_conversion.
    """
    return torch.cat([A, A0.to(A)]), torch.cat([B, -B0.to(B)], 1)

import torch
from torch import Tensor

from quant import QuantizedTensor, dequantize

from . import Wrong

Gradients = tuple[Tensor, Tensor, Tensor]


def right(dy: Tensor, q: QuantizedTensor, A: Tensor, B: Tensor, s: float, saved: tuple[Tensor, ...]) -> Gradients:
    """By the sums over rows, not by the check's products."""
    x, W = saved[0], dequantize(q, dy.dtype)
    dx, dA, dB = [], 0, 0
    for row, slope in zip(x, dy, strict=True):
        dx.append(slope @ (W + s * B @ A))
        dA = dA + s * (slope @ B).outer(row)
        dB = dB + s * slope.outer(A @ row)
    return torch.stack(dx), dA, dB


def base_forgotten(dy, q, A, B, s, saved):
    dx, dA, dB = right(dy, q, A, B, s, saved)
    return dx - dy @ dequantize(q, dy.dtype), dA, dB


def adapter_forgotten(dy, q, A, B, s, saved):
    _, dA, dB = right(dy, q, A, B, s, saved)
    return dy @ dequantize(q, dy.dtype), dA, dB


def dA_unscaled(dy, q, A, B, s, saved):
    dx, _, dB = right(dy, q, A, B, s, saved)
    return dx, (dy @ B).T @ saved[0], dB


def dB_unscaled(dy, q, A, B, s, saved):
    dx, dA, _ = right(dy, q, A, B, s, saved)
    return dx, dA, dy.T @ (saved[0] @ A.T)


def averaged(dy, q, A, B, s, saved):
    dx, dA, dB = right(dy, q, A, B, s, saved)
    return dx, dA / len(dy), dB / len(dy)


def dB_transposed(dy, q, A, B, s, saved):
    dx, dA, dB = right(dy, q, A, B, s, saved)
    return dx, dA, dB.T


def weight_kept(x, q, A, B, s):
    W = dequantize(q, x.dtype)
    return x @ W.T + s * x @ A.T @ B.T, (x, x @ A.T, W)


def only_y(x, q, A, B, s):
    return x @ dequantize(q, x.dtype).T + s * x @ A.T @ B.T


WRONG = [
    Wrong("dx lacks the base", {"backward": base_forgotten}),
    Wrong("dx lacks the adapter", {"backward": adapter_forgotten}),
    Wrong("dA is not scaled by s", {"backward": dA_unscaled}),
    Wrong("dB is not scaled by s", {"backward": dB_unscaled}),
    Wrong("divided by the number of rows", {"backward": averaged}),
    Wrong("must have shape (8, 2), got (2, 8)", {"backward": dB_transposed}),
    Wrong("saved holds more than x and x · Aᵀ", {"forward": weight_kept, "backward": right}),
    Wrong("forward must return (y, saved)", {"forward": only_y}),
]

"""kernels.grouped_lora_matmul: several projections of one input equal the separate calls, values and gradients."""

import pytest
import torch
from torch import Tensor

import kernels
import quant
from kernels import LoRATerm, Projection
from tests.accuracy import leaf

K = 96
WIDTHS = (64, 40, 33)


def projections(x: Tensor, *, quantized: bool) -> list[Projection]:
    """Without a term, with two of them and bias, and with its own x and a row scale."""
    bases = [quant.quantize(torch.randn(N, K)) if quantized else torch.randn(N, K).to(x.dtype) for N in WIDTHS]
    terms = [
        LoRATerm(leaf(torch.randn(r, K)), leaf(torch.randn(N, r)), s)
        for N, r, s in zip(WIDTHS, (4, 3, 8), (2, 0.5, 1), strict=True)
    ]
    second = LoRATerm(leaf(torch.randn(2, K)), leaf(torch.randn(WIDTHS[1], 2)), 0.25)
    return [
        Projection(bases[0]),
        Projection(bases[1], (terms[1], second), bias=leaf(torch.randn(WIDTHS[1]))),
        Projection(bases[2], (terms[2]._replace(x=2 * x.detach()),), row_scale=leaf(torch.rand(WIDTHS[2]))),
    ]


def separately(x: Tensor, group: list[Projection]) -> tuple[Tensor, ...]:
    return tuple(kernels.lora_matmul(x, p.base, p.adapters, bias=p.bias, row_scale=p.row_scale) for p in group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, K), (2, 3, K), (8, K), (9, K), (K,), (0, K)], ids=str)
@pytest.mark.parametrize("quantized", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_values_and_gradients_equal_the_separate_calls_to_the_bit(backend, quantized, shape, dtype) -> None:
    x = leaf(torch.randn(shape).to(dtype))
    group = projections(x, quantized=quantized)
    with kernels.use_backend(backend):
        with torch.no_grad():
            for ours, single in zip(kernels.grouped_lora_matmul(x, group), separately(x, group), strict=True):
                assert ours.dtype == dtype
                assert torch.equal(ours, single)
        together, apart = kernels.grouped_lora_matmul(x, group), separately(x, group)
        leaves = [x, *(t for p in group for term in p.adapters for t in (term.A, term.B))]
        leaves += [t for p in group for t in (p.bias, p.row_scale) if t is not None]
        grads = [torch.autograd.grad([y.float().square().sum() for y in ys], leaves) for ys in (together, apart)]
    for ours, single in zip(*grads, strict=True):
        assert torch.equal(ours, single)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_errors_are_those_of_lora_matmul(backend: str) -> None:
    x = torch.randn(1, K)
    with kernels.use_backend(backend), torch.no_grad():
        wrong = LoRATerm(torch.randn(2, K), torch.randn(5, 2), 1.0)
        with pytest.raises(ValueError, match=r"needs A \(r, 96\) and B \(64, r\)"):
            kernels.grouped_lora_matmul(x, [Projection(quant.quantize(torch.randn(64, K)), (wrong,))])
        with pytest.raises(ValueError, match=r"x \(…, 32\)"):
            kernels.grouped_lora_matmul(x, [Projection(quant.quantize(torch.randn(64, 32)))])
        with pytest.raises(ValueError, match=r"bias must be \(64,\)"):
            kernels.grouped_lora_matmul(x, [Projection(quant.quantize(torch.randn(64, K)), bias=torch.zeros(3))])
        assert kernels.grouped_lora_matmul(x, []) == ()

"""kernels/triton/linear_cross_entropy.py: nll and gradients against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import kernels
import quant
from kernels import Head, LoRATerm, use_backend
from tests.accuracy import assert_as_accurate_as, leaf

pytest.importorskip("triton", reason="Linux only")
from kernels.triton import launch
from kernels.triton import linear_cross_entropy as fused

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="these run in the interpreter; tests/gpu on a GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    z = F.linear(hidden, weight.to(hidden.dtype)).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    return -torch.log_softmax(z, dim=1).gather(1, targets[:, None]).view(-1)


def ran_fused(tensor: torch.Tensor) -> bool:
    """Is the fused function a node of the graph behind this tensor?"""
    nodes = [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if "_FusedLinearCrossEntropy" in type(node).__name__:
            return True
        nodes += [n for n, _ in node.next_functions if n is not None]
    return False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "D", "V"), [(20, 64, 97), (5, 40, 33)])
@pytest.mark.parametrize(("weight_dtype", "temperature"), [(None, 1.0), (torch.float32, 0.7)])
@pytest.mark.usefixtures("nan_filled_empty")
def test_a_dense_head(M, D, V, weight_dtype, temperature, dtype) -> None:
    hidden, weight = torch.randn(M, D).to(dtype), torch.randn(V, D).to(weight_dtype or dtype)
    targets, dnll = torch.randint(V, (M,)), torch.randn(M)
    ours, plain, wide = ([leaf(t.to(d or t.dtype)) for t in (hidden, weight)] for d in (None, None, torch.float64))
    with use_backend("triton"):
        nll = kernels.linear_cross_entropy(*ours, targets, temperature=temperature)
    assert ran_fused(nll)
    nll.backward(dnll)
    plain_value = plain_nll(*plain, targets, temperature)
    plain_value.backward(dnll)
    exact = plain_nll(*wide, targets, temperature)
    exact.backward(dnll.double())
    assert_as_accurate_as(plain_value, nll, exact.detach())
    for o, p, w in zip(ours, plain, wide, strict=True):
        assert_as_accurate_as(p.grad, o.grad, w.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_a_4_bit_head(dtype) -> None:
    M, D, V = 18, 128, 50
    q, hidden = quant.quantize(torch.randn(V, D), blocksize=32), torch.randn(M, D).to(dtype)
    targets, dnll = torch.randint(V, (M,)), torch.randn(M)
    ours, plain, wide = leaf(hidden), leaf(hidden), leaf(hidden.double())
    with use_backend("triton"):
        nll = kernels.linear_cross_entropy(ours, q, targets)
    assert ran_fused(nll)
    nll.backward(dnll)
    plain_value = plain_nll(plain, quant.dequantize(q, dtype), targets, 1.0)
    plain_value.backward(dnll)
    exact = plain_nll(wide, quant.dequantize(q, torch.float64), targets, 1.0)
    exact.backward(dnll.double())
    assert_as_accurate_as(plain_value, nll, exact.detach())
    assert_as_accurate_as(plain.grad, ours.grad, wide.grad)


def test_far_logits_and_a_target_far_below_the_rest() -> None:
    hidden, weight = torch.eye(4, 64), torch.randn(40, 64) * 300
    targets = torch.tensor([0, 39, 7, 20])
    with use_backend("triton"):
        nll = kernels.linear_cross_entropy(hidden, weight, targets)
    exact = plain_nll(hidden.double(), weight.double(), targets, 1.0)
    assert_as_accurate_as(plain_nll(hidden, weight, targets, 1.0), nll, exact)


def test_ignored_rows_cost_and_give_nothing() -> None:
    hidden, weight = leaf(torch.randn(6, 64)), torch.randn(33, 64)
    targets = torch.tensor([3, -100, 5, -100, -100, 32])
    with use_backend("triton"):
        nll = kernels.linear_cross_entropy(hidden, weight, targets)
        nothing = kernels.linear_cross_entropy(hidden, weight, torch.full((6,), -100))
    nll.sum().backward()
    assert nothing.tolist() == [0.0] * 6
    assert nll[targets < 0].tolist() == [0.0] * 3
    assert hidden.grad[targets < 0].abs().sum() == 0
    torch.testing.assert_close(nll[targets >= 0], plain_nll(hidden, weight, targets.clamp(0), 1.0)[targets >= 0])


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = torch.randn(9, 64), torch.randn(40, 64), torch.randint(40, (9,))
    grads = []
    for chunk_bytes in (fused.CHUNK_BYTES, 4 * 40 * 4):
        monkeypatch.setattr(fused, "CHUNK_BYTES", chunk_bytes)
        leaves = [leaf(hidden), leaf(weight)]
        with use_backend("triton"):
            kernels.linear_cross_entropy(*leaves, targets).sum().backward()
        grads.append([t.grad for t in leaves])
    for whole, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(whole, chunked)


@pytest.mark.parametrize("part", ["softcap", "entropy", "bias", "adapter", "D"])
def test_the_rest_is_composed_by_the_reference(part: str) -> None:
    D = 70 if part == "D" else 64
    weight = quant.quantize(torch.randn(33, D))
    hidden, targets = torch.randn(4, D), torch.randint(33, (4,))
    term = LoRATerm(torch.randn(2, D), torch.randn(33, 2), 0.5)
    head = Head(weight, (term,) if part == "adapter" else (), torch.randn(33) if part == "bias" else None)
    options = {"softcap": 5.0 if part == "softcap" else None, "return_entropy": part == "entropy"}
    results = []
    for backend in ("triton", "reference"):
        x = leaf(hidden)
        with use_backend(backend):
            out = kernels.linear_cross_entropy(x, head, targets, **options)
        nll = out[0] if part == "entropy" else out
        assert not ran_fused(nll)
        nll.sum().backward()
        results.append((out if part == "entropy" else (out,), x.grad))
    torch.testing.assert_close(results[0], results[1])

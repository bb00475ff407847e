"""kernels/triton/ops.py: torch's own checks of a registered operator, and one graph under torch.compile."""

from __future__ import annotations

import pytest
import torch

import kernels
import quant
from kernels import use_backend
from tests.accuracy import leaf

pytest.importorskip("triton", reason="Linux only")
from kernels.triton import launch, ops

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="these run in the interpreter; tests/gpu on a GPU")


@pytest.mark.parametrize("double_quant", [True, False])
def test_opcheck(double_quant: bool) -> None:
    q = quant.quantize(torch.randn(6, 64), double_quant=double_quant)
    x, bias = leaf(torch.randn(2, 3, 64)), leaf(torch.randn(6))
    torch.library.opcheck(ops.matmul_4bit, (x, bias, *ops.parts(q)))
    torch.library.opcheck(ops.matmul_4bit, (x, None, *ops.parts(q)))
    torch.library.opcheck(ops.matmul_4bit_dx, (torch.randn(2, 3, 6), *ops.parts(q)))


def test_value_and_gradients_are_those_of_matmul() -> None:
    q = quant.quantize(torch.randn(6, 64))
    leaves = [[leaf(t) for t in (torch.ones(3, 64), torch.ones(6))] for _ in range(2)]
    y = ops.matmul(leaves[0][0], q, leaves[0][1])
    with use_backend("triton"):
        expected = kernels.matmul(leaves[1][0], q, leaves[1][1])
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_torch_compile_keeps_one_graph_forward_and_backward() -> None:
    q = quant.quantize(torch.randn(6, 64))
    compiled = torch.compile(lambda x: ops.matmul(x * 2, q).relu(), backend="aot_eager", fullgraph=True)
    x, plain = leaf(torch.ones(3, 64)), leaf(torch.ones(3, 64))
    y = compiled(x)
    y.sum().backward()
    expected = ops.matmul(plain * 2, q).relu()
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, plain.grad)

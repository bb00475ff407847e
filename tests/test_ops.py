"""kernels/ops.py: torch's own checks of its operators; products and a whole model under torch.compile as one graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import kernels
import quant
from kernels import LoRATerm, cpu, ops, use_backend
from lora import LoRAConfig, add_adapter, quantize_model, trainable_parameters
from tests.accuracy import assert_as_accurate_as, leaf
from tests.small_llama import small_decoder

BACKENDS = ["reference"]
if cpu.library.why_missing() is None:
    BACKENDS.append("cpu")
try:
    from kernels.triton import launch
except ImportError:  # Linux only
    pass
else:
    BACKENDS += ["triton"] if launch.interpreted() else []  # tests/gpu has the same on a GPU


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("double_quant", [True, False])
def test_opcheck(double_quant: bool, backend: str) -> None:
    q = quant.quantize(torch.randn(6, 64), double_quant=double_quant)
    x, bias, low, up = (leaf(torch.randn(shape)) for shape in ((2, 3, 64), (6,), (6, 2), (6, 2)))
    for terms in ((bias, None, None), (None, low, up), (None, None, None)):
        torch.library.opcheck(ops.matmul_4bit, (x, *terms, *ops.parts(q)))
    torch.library.opcheck(ops.matmul_4bit_dx, (torch.randn(2, 3, 6), *ops.parts(q)))


def results(function, *leaves: Tensor) -> list[Tensor]:
    """y, and the gradient of each leaf."""
    fresh = [leaf(t) for t in leaves]
    y = function(*fresh)
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in fresh)]


def compiled(function):
    """One graph forward and one backward, or an error; the graphs run as they are."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_a_compiled_matmul_gives_the_same_bits(backend: str) -> None:
    q = quant.quantize(torch.randn(6, 64))

    def function(x: Tensor, bias: Tensor) -> Tensor:
        return kernels.matmul(x * 2, q, bias).relu()

    leaves = torch.randn(2, 3, 64), torch.randn(6)
    for ours, theirs in zip(results(compiled(function), *leaves), results(function, *leaves), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(compiled(function)(*leaves), function(*leaves))


@pytest.mark.parametrize("base", ["4-bit", "dense"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_lora_matmul_is_as_accurate(dtype: torch.dtype, dora: bool, base: str, backend: str) -> None:
    """Two adapters, one with an input of its own, as dropout gives it. Nothing rounds otherwise in y."""
    q = quant.quantize(torch.randn(20, 64))
    weight = q if base == "4-bit" else quant.dequantize(q)
    scale = torch.rand(20) if dora else None

    def function(x: Tensor, *factors: Tensor, of: object = weight) -> Tensor:
        A1, B1, A2, B2, bias = factors
        terms = [LoRATerm(A1, B1, 0.5), LoRATerm(A2, B2, 2.0, x=x * 1.25)]
        c = None if scale is None else scale.to(torch.promote_types(x.dtype, scale.dtype))
        return kernels.lora_matmul(x, of, terms, bias=bias, row_scale=c)

    leaves = [torch.randn(5, 64).to(dtype)]
    leaves += [torch.randn(shape) for shape in ((3, 64), (20, 3), (2, 64), (20, 2), (20,))]
    ours, plain = results(compiled(function), *leaves), results(function, *leaves)
    with use_backend("reference"):
        wide = quant.dequantize(q, torch.float64)
        exact = results(lambda *wides: function(*wides, of=wide), *(t.double() for t in leaves))
    assert torch.equal(ours[0], plain[0])
    for mine, theirs, value in zip(ours, plain, exact, strict=True):
        assert_as_accurate_as(theirs, mine, value)


def test_a_compiled_model_is_one_graph_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 4-bit decoder with adapters: logits equal the tensor operations' to the bit; gradients differ by how dx adds
    the low-rank share. What runs eagerly in C differs by its roundings."""
    torch._dynamo.reset()
    model = small_decoder(hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=1)
    quantize_model(model)
    add_adapter(model, LoRAConfig(r=4))
    factors = [parameter for _, parameter in trainable_parameters(model)]
    for parameter in factors:
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(12).view(2, 6)

    def run(function) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = function(ids)
        return logits, torch.autograd.grad(logits.square().mean(), factors)

    logits, gradients = run(compiled(model))
    torch.testing.assert_close((logits, gradients), run(model))
    monkeypatch.setattr("models.elementwise.one_pass", lambda *_: None)
    expected, plain = run(model)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(gradients, plain)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.compile's, at the calls where it breaks the graph
def test_the_loss_breaks_the_graph_and_stays_the_same() -> None:
    """How many rows count is data, which a graph cannot depend on: what comes before it and after is compiled."""
    torch._dynamo.reset()
    weight, targets = quant.quantize(torch.randn(20, 64)), torch.tensor([3, -100, 19])

    def function(x: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x * 2, weight, targets) * 3

    x = torch.randn(3, 64)
    for ours, theirs in zip(
        results(torch.compile(function, backend="aot_eager"), x), results(function, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs)

"""kernels/cpu/elementwise and dense, on every instruction set here, against float64: odd sizes, strides, far values."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import use_backend, vocabulary_tiles
from kernels.cpu import dense, elementwise, library
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.matmul import linear
from kernels.vocabulary_tiles import RunningSoftmax
from models.elementwise import apply_rope, rms_norm, swiglu
from models.sampling import BLOCK, softmax
from tests.accuracy import assert_as_accurate_as, error, leaf

pytestmark = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))
DTYPES = [torch.float32, torch.bfloat16]
USABLE = library.usable_isas(library.build()) if library.why_missing() is None else ("portable",)


@pytest.fixture(params=USABLE, autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QLORA_CPU_ISA", request.param)
    torch.manual_seed(0)
    with use_backend("cpu"):
        yield


def compare(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> None:
    """Value and gradients of `ours`, at most twice as far from float64 as plain PyTorch's in this dtype."""
    results: list[list[Any]] = []
    for function, made in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
        leaves = [leaf(x.to(dtype).to(made)) for x in inputs]
        y = function(*leaves)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype).to(made))
        results.append([y.detach(), *(x.grad for x in leaves)])
    for got, plainly, exact in zip(*results, strict=True):
        assert_as_accurate_as(plainly, got, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 33), (5, 1100), (40, 576)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gain = torch.rand(shape[-1]) + 0.5
    plain = lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain.to(x.dtype)  # noqa: E731
    ours = lambda x: rms_norm(x, gain.to(dtype), 1e-5)  # noqa: E731
    compare(
        ours, plain, [torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))], dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 513, 20_000])
def test_swiglu(n: int, dtype: torch.dtype) -> None:
    gate = torch.randn(n) * 3
    gate[3::7] = torch.linspace(-200, 200, len(gate[3::7]))  # e^200 is beyond fp32
    compare(swiglu, lambda a, b: F.silu(a) * b, [gate, torch.randn(n)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_rope_of_heads_that_lie_apart(rows: int, dtype: torch.dtype) -> None:
    angles = torch.rand(rows, 7, 1, 5) * 6
    cos, sin = angles.cos(), angles.sin()

    def plain(x: Tensor) -> Tensor:
        a, b = x.transpose(1, 2).chunk(2, dim=-1)
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1).transpose(1, 2)

    compare(lambda x: apply_rope(x.transpose(1, 2), cos, sin).transpose(1, 2), plain, [torch.randn(2, 3, 7, 10)], dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("V", [5, 37, 1100])
def test_the_softmax_of_the_loss(V: int, temperature: float) -> None:
    x, weight, targets = torch.randn(9, 32) * 3, torch.randn(V, 32), torch.randint(V, (9,))
    found = []
    for backend, made in (("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        with use_backend(backend):
            hidden = leaf(x.to(made))
            nll, entropy = linear_cross_entropy(
                hidden, weight.to(made), targets, temperature=temperature, return_entropy=True
            )
            nll.sum().backward()
            found.append((nll, entropy, hidden.grad))
    for ours, plain, exact in zip(*found, strict=True):
        assert_as_accurate_as(plain, ours, exact)


@pytest.mark.parametrize("likely", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("M", [1, 130])
@pytest.mark.parametrize("V", [32, 1504])  # a tile, and two of which the second is shorter
def test_the_loss_under_a_frozen_head_in_bf16(V: int, M: int, temperature: float, likely: bool) -> None:
    """Where targets are likely, their gradient is a small difference, 1 - p."""
    x, weight = torch.randn(M, 64).bfloat16() * 2, torch.randn(V, 64).bfloat16()
    targets, dnll, found = torch.randint(V, (M,)), torch.rand(M), []
    if likely:
        x = (weight[targets] / 5).bfloat16()

    def by_definition(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        z = hidden @ weight.T
        logps = torch.log_softmax((z if z.dtype == torch.float64 else z.float()) / temperature, dim=1)
        return -logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(dim=1)

    assert vocabulary_tiles.serves(x, (weight, (), None), None)
    for loss, cast in (
        (
            lambda h, w: linear_cross_entropy(h, w, targets, temperature=temperature, return_entropy=True),
            lambda t: t,
        ),
        (by_definition, lambda t: t),
        (by_definition, lambda t: t.double()),
    ):
        hidden = leaf(cast(x))
        nll, entropy = loss(hidden, cast(weight))
        (nll * dnll).sum().backward()
        found.append((nll, entropy, hidden.grad))
    for ours, plain, exact in zip(*found, strict=True):
        assert_as_accurate_as(plain, ours, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 9, 64, 97, 600])
@pytest.mark.parametrize(("N", "K"), [(32, 32), (416, 608)])
def test_dense_products(N: int, K: int, M: int, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x, weight = torch.randn(M, K).to(x_dtype), torch.randn(N, K).to(dtype)
    assert dense.fits(x, weight)
    if dense.in_pairs(x, weight):
        assert dense.serves(x, weight) == (M <= 96)
    else:
        portable = os.environ["QLORA_CPU_ISA"] == "portable"
        assert dense.serves(x, weight) == (M <= 16 or dtype != x_dtype or not portable)
    found = dense.product(x, weight, torch.empty(M, N))
    exact = x.double() @ weight.double().T
    assert_as_accurate_as(x.float() @ weight.float().T, found, exact)
    beside = torch.cat([x, torch.randn(max(1, 8 - M), K).to(x_dtype)])
    more = dense.product(beside, weight, torch.empty(len(beside), N))
    assert torch.equal(more[:M], found)  # by the same kernel, whatever stands beside a row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_in_bf16_gives_bf16(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 3, 64).bfloat16(), torch.randn(96, 64).to(dtype), torch.randn(96)
    with torch.no_grad():
        found = linear(x, weight, bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert_as_accurate_as((x @ weight.bfloat16().T) + bias.bfloat16(), found, exact)
    assert error(found, exact) <= 1.01 * error(exact.bfloat16(), exact)  # rounded once
    with torch.no_grad():
        unrounded = linear(x, weight, bias, out_dtype=torch.float32)
    assert_as_accurate_as(x.float() @ weight.float().T + bias, unrounded, exact)


def test_dense_products_that_do_not_fit_are_left_to_torch() -> None:
    for N, K in ((48, 32), (32, 48)):
        assert not dense.serves(torch.randn(4, K), torch.randn(N, K))
    assert not dense.serves(torch.randn(4, 32).double(), torch.randn(32, 32))


@pytest.mark.parametrize(("V", "temperature"), [(3, 1.0), (128, 1.0), (300, 0.3), (49152, 1.7)])
def test_softmax_blocks(V: int, temperature: float) -> None:
    z = 3 * torch.randn(5, V)
    z[1, 0], z[2, 1:] = 200, -torch.inf
    ours, (plain, exact) = softmax(z, temperature), (_blocks(t, temperature) for t in (z, z.double()))
    assert torch.equal(ours.largest, z.amax(dim=1, keepdim=True))
    assert_as_accurate_as(plain[0], ours.blocks, exact[0])
    assert_as_accurate_as(plain[1], ours.log_total, exact[1])
    with use_backend("reference"):
        torch.testing.assert_close(tuple(ours[2:]), tuple(softmax(z, temperature)[2:]))


def _blocks(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    p = torch.softmax(z / temperature, dim=1)
    shares = torch.stack([part.sum(dim=1) for part in p.split(BLOCK, dim=1)], dim=1)
    shifted = (z - z.amax(dim=1, keepdim=True)) / temperature
    return shares, shifted.logsumexp(dim=1, keepdim=True)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, g, weight = torch.randn(300, 100), torch.rand(100), torch.randn(224, 96).bfloat16()
    z, targets = torch.randn(30, 1000), torch.randint(1000, (30,))
    results, threads = [], torch.get_num_threads()
    for n in (1, 3):
        torch.set_num_threads(n)
        sums, p, more, slope = RunningSoftmax(targets, 1.0, z, with_entropy=True), z.clone(), 2 * z, x[:30].clone()
        sums.take(p, 0, None)
        sums.take(more, 1000, slope)
        y, rho = elementwise.rms_norm(x, g, 1e-5)
        dx = elementwise.rms_norm_dx(y, x, g, rho)
        few = dense.product(x[:7, :96].contiguous(), weight, torch.empty(7, 224))
        many = dense.product(x[:, :96].contiguous(), weight, torch.empty(300, 224))
        in_bf16 = [dense.product(x[:M, :96].bfloat16(), weight, torch.empty(M, 224)) for M in (7, 300)]
        swiglus = (elementwise.swiglu(x, y), *elementwise.swiglu_dx(dx, x, y))
        losses = (p, more, slope, sums.nll(), sums.entropy())
        results.append((*losses, y, dx, few, many, *in_bf16, *elementwise.softmax_blocks(z, 1.0, 128), *swiglus))
    torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)

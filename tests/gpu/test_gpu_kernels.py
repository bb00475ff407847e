"""Every Triton kernel on the GPU that is here: all tile shapes, dtypes, tails, forward and each gradient.

Tolerance as everywhere: the error against float64 is at most twice that of plain PyTorch on the same GPU and dtype.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import kernels
import quant
from kernels import LoRATerm, use_backend
from tests.accuracy import assert_as_accurate_as, leaf

pytest.importorskip("triton", reason="Linux only")
from kernels.triton import autotune, dequantize, matmul

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(1, 40, 64), (3, 257, 576), (17, 129, 1536), (200, 300, 512), (1, 4096, 4096)]  # (M, N, K)


def quantized(N: int, K: int, device: torch.device, **options: object) -> quant.QuantizedTensor:
    return quant.quantize(torch.randn(N, K), **options).to(device)


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 77), (3, 7, 5), (64, 576), (301, 4096)])
@pytest.mark.usefixtures("nan_filled_empty")
def test_dequantize_equals_the_definition_to_the_bit(shape, dtype, device) -> None:
    for quant_type in ("nf4", "fp4", "int4", "nf3"):
        for double_quant in (True, False):
            for blocksize in (32, 64, 256):
                options = {"quant_type": quant_type, "double_quant": double_quant, "blocksize": blocksize}
                q = quant.quantize(torch.randn(shape), **options)
                with use_backend("triton"):
                    weight = kernels.dequantize(q.to(device), dtype)
                assert torch.equal(weight.cpu(), quant.dequantize(q, dtype))


def test_both_kernels_of_dequantize_run(device) -> None:
    whole, odd = quantized(64, 64, device), quantized(5, 77, device)
    assert dequantize.words_fit(whole, torch.empty(64, 64, dtype=torch.float16, device=device))
    assert not dequantize.words_fit(odd, torch.empty(5, 77, dtype=torch.float16, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_quantize_equals_the_definition_to_the_bit(quant_type, dtype, device) -> None:
    for shape, blocksize in (((1,), 64), ((5, 77), 32), ((301, 576), 64), ((40, 129), 4096)):
        weight = torch.randn(shape).to(dtype)
        with use_backend("triton"):
            ours = kernels.quantize(weight.to(device), quant_type=quant_type, blocksize=blocksize)
        for name, tensor in quant.quantize(weight, quant_type=quant_type, blocksize=blocksize).tensors().items():
            assert torch.equal(getattr(ours, name).cpu(), tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.usefixtures("nan_filled_empty")
def test_every_tile_of_forward_and_backward(M, N, K, blocksize, dtype, device) -> None:
    if K % blocksize:
        pytest.skip("blocks cross the ends of rows: dequantize and torch.matmul")
    if matmul.why_no_tensor_cores(device):
        pytest.skip("no fused products on this GPU")
    q, bias = quantized(N, K, device, blocksize=blocksize), randn(N, dtype=dtype, device=device)
    x, dy = (randn(M, size, dtype=dtype, device=device) for size in (K, N))
    weight, wide = quant.dequantize(q, dtype), quant.dequantize(q, torch.float64)
    y, dx = x.double() @ wide.T + bias.double(), dy.double() @ wide
    for config in matmul.candidates_for("forward", q, dtype, device, 10**6):
        ours = matmul.launch_forward(x, q, bias, None, config)
        assert_as_accurate_as(F.linear(x, weight, bias), ours, y)
    for config in matmul.candidates_for("backward", q, dtype, device, 10**6):
        assert_as_accurate_as(dy @ weight, matmul.launch_backward(dy, q, None, config), dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "ranks"), [(3, 40, 64, (2,)), (130, 257, 576, (16,)), (33, 96, 512, (8, 24))])
@pytest.mark.usefixtures("nan_filled_empty")
def test_lora_matmul_and_its_gradients(M, N, K, ranks, dtype, device) -> None:
    q, bias, dy = quantized(N, K, device), torch.randn(N, device=device), randn(M, N, dtype=dtype, device=device)
    x = randn(M, K, dtype=dtype, device=device)
    factors = [(randn(r, K, device=device), randn(N, r, device=device)) for r in ranks]

    def run(backend: str, wide: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [leaf(t if wide is None else t.to(wide)) for t in (x, bias, *(f for pair in factors for f in pair))]
        terms = [LoRATerm(A, B, 0.5) for A, B in zip(leaves[2::2], leaves[3::2], strict=True)]
        with use_backend(backend):
            y = kernels.lora_matmul(leaves[0], q, terms, bias=leaves[1])
        y.backward(dy.to(y.dtype))
        return [y, *(t.grad for t in leaves)]

    for plain, ours, exact in zip(
        run("reference", None), run("triton", None), run("reference", torch.float64), strict=True
    ):
        assert_as_accurate_as(plain, ours, exact.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantized_head", [True, False])
@pytest.mark.usefixtures("nan_filled_empty")
def test_linear_cross_entropy(quantized_head, dtype, device) -> None:
    M, D, V = 130, 576, 1003
    q, hidden, dnll = quantized(V, D, device), randn(M, D, dtype=dtype, device=device), torch.randn(M, device=device)
    targets = torch.randint(V, (M,), device=device)
    weight = quant.dequantize(q, dtype)

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        z = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)) / 0.7
        return F.cross_entropy(z, targets, reduction="none")  # gather has no deterministic gradient on a GPU

    def run(function, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = leaf(hidden)
        nll = function(hidden)
        nll.backward(dnll.to(nll.dtype))
        return nll, hidden.grad

    def ours(hidden: torch.Tensor) -> torch.Tensor:
        with use_backend("triton"):
            return kernels.linear_cross_entropy(hidden, q if quantized_head else weight, targets, temperature=0.7)

    wide = quant.dequantize(q, torch.float64) if quantized_head else weight.double()
    exact = run(lambda h: plain(h, wide), hidden.double())
    for p, o, e in zip(run(lambda h: plain(h, weight), hidden), run(ours, hidden), exact, strict=True):
        assert_as_accurate_as(p, o, e.detach())


@pytest.mark.parametrize("M", [1, 4, 64])
def test_equal_inputs_give_equal_bits(M, device) -> None:
    q, x = quantized(512, 4096, device), randn(M, 4096, dtype=torch.float16, device=device)
    with use_backend("triton"):
        kernels.matmul(x, q)
        first = kernels.matmul(x, q)
        assert all(torch.equal(kernels.matmul(x, q), first) for _ in range(20))


def test_auto_takes_triton_and_autotune_keeps_a_choice(device) -> None:
    q, x = quantized(256, 512, device), randn(32, 512, dtype=torch.float16, device=device)
    kernels.matmul(x, q)
    if matmul.why_no_tensor_cores(device) is None:
        assert any("256x512" in line and "dequantize + torch.matmul" in line for line in autotune.table())


def test_a_cuda_graph_replays_the_product(device) -> None:
    q, x = quantized(256, 512, device), randn(1, 512, dtype=torch.float16, device=device)
    with torch.no_grad(), use_backend("triton"):
        expected = kernels.matmul(x, q)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernels.matmul(x, q)
        y.zero_()
        graph.replay()
    torch.testing.assert_close(y, expected)


def test_torch_compile_keeps_one_graph_with_inductor_and_cuda_graphs(device) -> None:
    """mode="reduce-overhead" puts the compiled graph into a CUDA graph: three calls, to record and to replay it."""
    q, x = quantized(256, 512, device), randn(4, 512, dtype=torch.float16, device=device)
    term = LoRATerm(randn(8, 512, device=device), randn(256, 8, device=device), 0.5)

    def function(x: torch.Tensor) -> torch.Tensor:
        return kernels.lora_matmul(x * 2, q, [term]).relu()

    expected = function(x)
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(function, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected)

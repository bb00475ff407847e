"""kernels/cpu/: quantize and dequantize to the bit, products against float64, on every instruction set here.

Outputs start as NaN, shapes are odd, and a margin after every output must stay untouched.
"""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import kernels
import quant
from kernels import LoRATerm, use_backend
from kernels.cpu import library, maps
from tests.accuracy import assert_as_accurate_as, leaf

pytestmark = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))
ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 40, 523]  # the few-row kernel ends at 8, a sweep at 512


USABLE = library.usable_isas(library.build()) if library.why_missing() is None else ("portable",)


@pytest.fixture(params=USABLE, autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test runs on every instruction set, and never falls back."""
    monkeypatch.setenv("QLORA_CPU_ISA", request.param)
    with use_backend("cpu"):
        assert library.load().isa == request.param
        yield request.param


def assert_equal(ours: quant.QuantizedTensor, definition: quant.QuantizedTensor) -> None:
    assert set(ours.tensors()) == set(definition.tensors())
    for name, tensor in definition.tensors().items():
        assert torch.equal(getattr(ours, name), tensor), name
    for field in ("blocksize", "blocksize2", "shape", "dtype", "quant_type"):
        assert getattr(ours, field) == getattr(definition, field)


def weights(n: int, dtype: torch.dtype) -> Tensor:
    """With zeros, a block too small to invert, a negative zero and equal extremes among them."""
    values = torch.randn(n) * 0.1
    values[64:128] = 0
    values[128:160] = 1e-42
    values[5:7] = torch.tensor([-0.0, 0.7])[: max(0, n - 5)]
    return values.to(dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 31, 33, 64, 255, 4095, 4097, 70_001])
@pytest.mark.usefixtures("nan_filled_empty")
def test_quantize_and_dequantize_equal_the_definition_to_the_bit(n: int, dtype: torch.dtype, quant_type: str) -> None:
    for blocksize in (32, 64, 4096):
        for double_quant in (True, False):
            options = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
            weight = weights(n, dtype)
            definition = quant.quantize(weight, **options)
            assert_equal(kernels.quantize(weight, **options), definition)
            for out_dtype in ALL_DTYPES:
                assert torch.equal(kernels.dequantize(definition, out_dtype), quant.dequantize(definition, out_dtype))


def test_a_scaled_weight_on_a_midpoint_takes_the_lower_code() -> None:
    code = quant.nf4_codebook()
    halves = (code[:-1] + code[1:]) / 2
    up, down = torch.nextafter(halves, torch.tensor(2.0)), torch.nextafter(halves, torch.tensor(-2.0))
    block = torch.cat([torch.ones(1), halves, up, down, torch.zeros(18)])
    assert_equal(kernels.quantize(block), quant.quantize(block))


def test_scales_on_a_tie_of_the_8_bit_map_take_the_even_index() -> None:
    levels = quant.dynamic_map(signed=True).double()
    ties = ((levels[:-1] + levels[1:]) / 2).float()
    absmax = torch.cat([ties, torch.tensor([1.0, -1.0])])  # their mean is not 0: most are near a tie, not on it
    ours = torch.empty(len(absmax), dtype=torch.uint8), torch.empty(2), torch.empty(())
    second_map = ctypes.byref(maps.map_8bit(signed=True))
    library.load().quantize_absmax(absmax.data_ptr(), len(absmax), second_map, *(t.data_ptr() for t in ours), 1)
    definition = quant.double_quant.quantize_absmax(absmax, quant.dynamic_map())
    assert all(torch.equal(a, b) for a, b in zip(ours, definition, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 63, 100])
def test_a_weight_that_is_not_finite_is_refused(bad: float, at: int) -> None:
    weight = torch.randn(101)
    weight[at] = bad
    with pytest.raises(ValueError, match="finite weights, found NaN or infinity"):
        kernels.quantize(weight)


@pytest.mark.parametrize("bits", range(0, 1 << 16, 1 << 13))
def test_every_bf16_and_fp16_is_read_as_torch_reads_it(bits: int) -> None:
    patterns = torch.arange(bits, bits + (1 << 13), dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        finite = patterns.view(dtype)
        finite = finite[finite.isfinite()]
        assert_equal(
            kernels.quantize(finite, blocksize=32, double_quant=False),
            quant.quantize(finite, blocksize=32, double_quant=False),
        )


def test_writing_fp16_and_bf16_rounds_as_torch_does() -> None:
    """Code 1 of a weight is its scale: scales of every magnitude, halfway cases among them."""
    exponents = torch.arange(-26, 18).float()
    mantissas = torch.tensor([1.0, 1 + 2**-8, 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, 2 - 2**-12])
    absmax = (torch.exp2(exponents)[:, None] * mantissas).view(-1)
    q = quant.quantize(torch.ones(32 * len(absmax)), blocksize=32, double_quant=False)
    q = q.with_tensors({"absmax": absmax})
    for dtype in ALL_DTYPES:
        assert torch.equal(kernels.dequantize(q, dtype), quant.dequantize(q, dtype))


def a_case(M: int, N: int, K: int, blocksize: int, dtype: torch.dtype, double_quant: bool):
    q = quant.quantize(torch.randn(N, K), blocksize=blocksize, double_quant=double_quant)
    return q, torch.randn(M, K).to(dtype), torch.randn(N), torch.randn(M, N).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", COUNTS)
@pytest.mark.parametrize(
    ("N", "K", "blocksize", "double_quant"),
    [
        (31, 32, 32, False),
        (33, 96, 32, True),
        (97, 320, 64, True),
        (130, 288, 4096, True),
        (50, 192, 32, True),
        (37, 576, 4096, True),
        (37, 576, 128, False),
    ],  # blocks that cross rows too; K with and without the kernel for few rows; a second absmax2 from within a row on
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_products_against_float64(M, N, K, blocksize, double_quant, dtype) -> None:
    q, x, bias, dy = a_case(M, N, K, blocksize, dtype, double_quant)
    ours_x = leaf(x)
    y = kernels.matmul(ours_x, q, bias)
    y.backward(dy)
    weight = quant.dequantize(q, torch.float32)
    plain_x = leaf(x)
    plain = torch.nn.functional.linear(plain_x, weight.to(dtype), bias.to(dtype))
    plain.backward(dy)
    exact_bias = bias.to(dtype).double()
    assert_as_accurate_as(plain, y, x.double() @ weight.double().T + exact_bias)
    assert_as_accurate_as(plain_x.grad, ours_x.grad, dy.double() @ weight.double())
    with torch.no_grad():
        assert torch.equal(kernels.matmul(x, q, bias), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_have_the_same_results_alone_and_together(dtype: torch.dtype) -> None:
    q, x, bias, _ = a_case(8, 50, 1088, 64, dtype, True)
    with torch.no_grad():
        together = kernels.matmul(x, q, bias)
        for M in range(1, 8):
            assert torch.equal(kernels.matmul(x[8 - M :], q, bias), together[8 - M :])


@pytest.mark.parametrize("M", [1, 5, 40])
def test_the_identity_gives_the_weight_to_the_bit(M: int) -> None:
    q = quant.quantize(torch.randn(96, 64))
    weight, eye = quant.dequantize(q), torch.eye(96)
    with torch.no_grad():
        assert torch.equal(kernels.matmul(torch.eye(64)[:M], q), weight.T[:M])
    assert torch.equal(kernels.cpu.operations.matmul_dx_cpu(eye[:M], q), weight[:M])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 3, 20, 523])
@pytest.mark.parametrize("ranks", [(1,), (16,), (3, 8), (300,)], ids=str)
@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"])
@pytest.mark.usefixtures("nan_filled_empty")
def test_lora_value_and_every_gradient(M, ranks, dropped, dtype) -> None:
    N, K = 70, 96
    q, x, bias, dy = a_case(M, N, K, 32, dtype, True)

    def rounded(*shape: int) -> Tensor:
        """fp32, as parameters are, with values that the activations' dtype holds."""
        return torch.randn(shape).to(dtype).float()

    masks = [2 * (torch.rand(M, K) < 0.5) for _ in ranks]
    leaves = {"x": x, "bias": bias.to(dtype).float()}
    for i, r in enumerate(ranks):
        leaves |= {f"A{i}": rounded(r, K), f"B{i}": rounded(N, r)} | ({f"x{i}": x * masks[i]} if dropped else {})

    def run(weight, cast):
        mine = {name: leaf(cast(tensor)) for name, tensor in leaves.items()}
        terms = [LoRATerm(mine[f"A{i}"], mine[f"B{i}"], 0.5 + i, mine.get(f"x{i}")) for i in range(len(ranks))]
        if isinstance(weight, quant.QuantizedTensor):
            y = kernels.lora_matmul(mine["x"], weight, terms, bias=mine["bias"])
        else:
            y = mine["x"] @ weight.T + mine["bias"]
            for term in terms:
                own = mine["x"] if term.x is None else term.x
                y = y + term.scaling * (own @ term.A.T) @ term.B.T
        y.backward(dy.to(y.dtype))
        return {"y": y} | {name: tensor.grad for name, tensor in mine.items()}

    weight = quant.dequantize(q, torch.float32)
    ours = run(q, lambda t: t)
    plain = run(weight.to(dtype), lambda t: t.to(dtype))
    exact = run(weight.double(), lambda t: t.double())
    for name, value in exact.items():
        assert_as_accurate_as(plain[name], ours[name].to(plain[name].dtype), value)


def test_b_zero_is_the_base_to_the_bit() -> None:
    q, x = quant.quantize(torch.randn(64, 64)), torch.randn(20, 64)
    term = LoRATerm(torch.randn(4, 64), torch.zeros(64, 4), 2.0)
    assert torch.equal(kernels.lora_matmul(x, q, [term]), kernels.matmul(x, q))
    assert torch.equal(kernels.lora_matmul(x[:2], q, [term]), kernels.matmul(x[:2], q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 7, 70])
def test_results_do_not_depend_on_the_number_of_threads(M: int, dtype: torch.dtype) -> None:
    q, x, bias, dy = a_case(M, 700, 576, 64, dtype, True)
    low, up, back = torch.randn(M, 5), torch.randn(700, 5), torch.randn(5, 576)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = kernels.cpu.operations.matmul_cpu(x, q, bias, low, up)
            dx = kernels.cpu.operations.matmul_dx_cpu(dy, q, low, back)
            results.append([y, dx, kernels.dequantize(q), *kernels.quantize(quant.dequantize(q)).tensors().values()])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("M", [3, 20])
def test_activations_in_fp32_may_be_multiplied_in_bf16(M: int) -> None:
    """As decoding asks for it: what multiplies pairs rounds x first, the others leave it."""
    lib, N, K, r = library.load(), 37, 192, 3
    q, x, low, up = quant.quantize(torch.randn(N, K)), torch.randn(M, K), torch.randn(M, r), torch.randn(N, r)
    weight, scratch = library.weight(q), torch.empty(lib.workspace_floats(M, N, K, r, 2))

    def run(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
        y = torch.empty(M, N)
        dtypes = (library.DTYPES[d] for d in (x.dtype, y.dtype, compute_dtype))
        pointers = (x.data_ptr(), y.data_ptr(), *dtypes, None, low.data_ptr(), up.data_ptr(), scratch.data_ptr())
        lib.matmul(ctypes.byref(library.Product(ctypes.pointer(weight), M, N, K, r, *pointers, 2)))
        return y

    found = run(x, torch.bfloat16)
    if lib.multiplies_pairs:
        assert torch.equal(found, run(x.bfloat16(), torch.bfloat16))
    else:
        assert torch.equal(found, run(x, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 6, 30])
def test_nothing_is_written_beyond_the_output(M: int, dtype: torch.dtype) -> None:
    """The kernels get outputs and scratch memory with a margin behind them."""
    lib, margin = library.load(), 4096
    N, K, r = 37, 96, 3
    q = quant.quantize(torch.randn(N, K))
    size = lib.workspace_floats(M, N, K, r, 2)
    low, up = torch.randn(M, r), torch.randn(max(N, K) * r)
    for name, inner, outer in (("matmul", K, N), ("matmul_dx", N, K)):
        x = torch.randn(M, inner).to(dtype)
        y = torch.full((M * outer + margin,), -7.0).to(dtype)
        scratch = torch.full((size + margin,), -7.0)
        dtypes = (library.DTYPES[dtype],) * 3
        pointers = (x.data_ptr(), y.data_ptr(), *dtypes, None, low.data_ptr(), up.data_ptr())
        weight = library.weight(q)
        product = library.Product(ctypes.pointer(weight), M, N, K, r, *pointers, scratch.data_ptr(), 2)
        getattr(lib, name)(ctypes.byref(product))
        assert (y[M * outer :] == -7).all()
        assert (scratch[size:] == -7).all()
    out = torch.full((q.numel + margin,), -7.0).to(dtype)
    lib.dequantize(ctypes.byref(library.weight(q)), out.data_ptr(), library.DTYPES[dtype], 2)
    assert (out[q.numel :] == -7).all()


def test_backward_keeps_no_dequantized_weight() -> None:
    saved: list[Tensor] = []
    q, x = quant.quantize(torch.randn(128, 96)), leaf(torch.randn(2, 96))
    term = LoRATerm(leaf(torch.randn(4, 96)), leaf(torch.randn(128, 4)), 1.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.lora_matmul(x, q, [term])
    assert saved
    assert max(t.numel() for t in saved) < 128 * 96


def test_rows_of_any_leading_shape_and_stride() -> None:
    q = quant.quantize(torch.randn(40, 64))
    x = torch.randn(3, 64, 5).transpose(1, 2)  # (3, 5, 64), not contiguous
    with torch.no_grad():
        expected = kernels.matmul(x.reshape(15, 64), q).view(3, 5, 40)
        assert torch.equal(kernels.matmul(x, q), expected)
        assert kernels.matmul(torch.randn(0, 64), q).shape == (0, 40)
        assert kernels.matmul(torch.randn(64), q).shape == (40,)
        one_output = quant.quantize(torch.ones(1, 32), double_quant=False)
        assert kernels.matmul(torch.ones(9, 32), one_output).tolist() == [[32.0]] * 9

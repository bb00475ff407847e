"""quant/blockwise.py against the loops of tests/reference.py, to the bit: rounding, ties, tails, zeros, packing."""

from itertools import pairwise

import pytest
import torch

from quant import BLOCKSIZES, blockwise, codebook, dequantize, quantize
from tests import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
QUANT_TYPES = ["nf4", "fp4", "int4", "nf3", "nf8"]

# mean |error| of N(0, 1) weights, measured by bitsandbytes' authors (tests/test_functional.py of 0.50.2)
PUBLISHED_NF4_ERROR = {32: 0.067746, 64: 0.072798, 128: 0.076831, 256: 0.080337, 4096: 0.092547}
PUBLISHED_FP4_ERROR = {32: 0.088925, 64: 0.096543, 128: 0.102969, 256: 0.108684, 4096: 0.129536}


def sizes(blocksize: int) -> list[int]:
    """One weight, odd counts, whole blocks, and last blocks of one and of many."""
    return [1, 2, blocksize - 1, blocksize, blocksize + 1, 2 * blocksize + 17]


def expected_bytes(weight: torch.Tensor, quant_type: str, blocksize: int) -> tuple[list[int], list[float]]:
    code = codebook(quant_type).tolist()
    indices, absmax = reference.quantize_blocks(weight.float().flatten().tolist(), code, blocksize)
    return (reference.pack(indices, code) if len(code) == 16 else indices), absmax


def indices_of(q) -> list[int]:
    return blockwise.unpack(q.packed, q.numel).tolist() if len(q.code) == 16 else q.packed.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_nf4_bytes_and_absmax_equal_the_loops(blocksize: int, dtype: torch.dtype) -> None:
    for n in sizes(blocksize):
        weight = torch.randn(n).to(dtype)
        q = quantize(weight, blocksize=blocksize, double_quant=False)
        packed, absmax = expected_bytes(weight, "nf4", blocksize)
        assert q.packed.tolist() == packed
        assert q.absmax.tolist() == absmax
        assert (q.packed.dtype, q.absmax.dtype) == (torch.uint8, torch.float32)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_every_code_book_equals_the_loops(quant_type: str) -> None:
    for n in sizes(64):
        weight = torch.randn(n)
        q = quantize(weight, quant_type=quant_type, double_quant=False)
        packed, absmax = expected_bytes(weight, quant_type, 64)
        assert q.packed.tolist() == packed
        assert q.absmax.tolist() == absmax


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_dequantize_is_one_product_and_one_rounding(quant_type: str, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5, 37)
    q = quantize(weight, quant_type=quant_type, double_quant=False)
    values = reference.dequantize_blocks(indices_of(q), q.absmax.tolist(), q.code.tolist(), 64)
    expected = torch.tensor(values).to(dtype).view(3, 5, 37)
    assert torch.equal(dequantize(q, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_returns_the_dtype_of_the_weight_unless_told_otherwise(dtype: torch.dtype) -> None:
    q = quantize(torch.randn(8, 8).to(dtype))
    assert dequantize(q).dtype == dtype
    assert dequantize(q, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_a_tie_goes_to_the_lower_level_and_one_ulp_more_to_the_upper(quant_type: str) -> None:
    levels = sorted(set(codebook(quant_type).tolist()))
    middle = torch.tensor([reference.f32((low + high) / 2) for low, high in pairwise(levels)])
    above = torch.nextafter(middle, torch.tensor(2.0))
    for values, expected in [(middle, levels[:-1]), (above, levels[1:])]:
        block = torch.cat([torch.ones(1), values])  # absmax 1, so that the scaled value is the value
        assert dequantize(quantize(block, quant_type=quant_type, double_quant=False))[1:].tolist() == expected


@pytest.mark.parametrize("tail", [False, True])
def test_weights_are_scaled_by_the_reciprocal_in_full_blocks_and_in_tails(tail: bool) -> None:
    absmax, value, index = a_weight_that_division_would_round_elsewhere()
    block = torch.zeros(40 if tail else 64)
    block[:2] = torch.tensor([absmax, value])
    q = quantize(block, double_quant=False)
    assert q.packed[0].item() & 15 == index


def a_weight_that_division_would_round_elsewhere() -> tuple[float, float, int]:
    """(absmax, weight, the right index): the scaled weight falls on either side of an NF4 midpoint."""
    code = codebook("nf4").tolist()
    middle = reference.f32((code[14] + code[15]) / 2)
    for absmax in torch.rand(10_000).add(1).tolist():
        value = reference.f32(middle * absmax)
        by_reciprocal = reference.nearest_code(reference.f32(value * reference.f32(1 / absmax)), code)
        by_division = reference.nearest_code(reference.f32(value / absmax), code)
        if by_reciprocal != by_division:
            return absmax, value, by_reciprocal
    raise AssertionError("no such weight among 10,000")


@pytest.mark.parametrize("n", [64, 40], ids=["full block", "tail"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-39], ids=["zero", "minus zero", "1/absmax overflows"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_a_block_without_a_scale_is_zero_throughout(quant_type: str, value: float, n: int) -> None:
    q = quantize(torch.full((n,), value), quant_type=quant_type, double_quant=False)
    assert q.absmax.tolist() == [0.0]
    assert set(q.code[blockwise.unpack(q.packed, n).int()].tolist()) == {0.0}
    assert dequantize(q).tolist() == [0.0] * n


def test_a_zero_block_stays_zero_under_double_quantization() -> None:
    weight = torch.randn(128, 64)
    weight[5] = 0
    assert dequantize(quantize(weight))[5].tolist() == [0.0] * 64


def test_the_first_code_sits_in_the_high_nibble() -> None:
    assert quantize(torch.tensor([1.0, -1.0]), double_quant=False).packed.tolist() == [15 * 16 + 0]


@pytest.mark.parametrize(("quant_type", "zero"), [("nf4", 7), ("fp4", 0)])
def test_an_odd_count_is_filled_with_the_code_of_zero(quant_type: str, zero: int) -> None:
    q = quantize(torch.ones(3), quant_type=quant_type, double_quant=False)
    assert q.packed.shape == (2,)
    assert q.packed[1].item() & 15 == zero
    assert dequantize(q).tolist() == [1.0] * 3


def test_blocks_run_across_the_ends_of_rows() -> None:
    weight = torch.randn(6, 48)
    in_rows, in_line = quantize(weight, double_quant=False), quantize(weight.flatten(), double_quant=False)
    assert torch.equal(in_rows.packed, in_line.packed)
    assert in_rows.absmax.tolist() == [b.abs().max().item() for b in weight.flatten().split(64)]


def test_a_transposed_weight_is_read_in_its_own_row_major_order() -> None:
    weight = torch.randn(24, 40).T
    assert not weight.is_contiguous()
    assert torch.equal(quantize(weight).packed, quantize(weight.contiguous()).packed)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantizing_a_dequantized_weight_changes_nothing(quant_type: str) -> None:
    first = quantize(torch.randn(1000), quant_type=quant_type, double_quant=False)
    second = quantize(dequantize(first), quant_type=quant_type, double_quant=False)
    assert torch.equal(second.packed, first.packed)
    assert torch.equal(dequantize(second), dequantize(first))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3 * 4096 + 100)
    whole = quantize(weight, blocksize=128)
    monkeypatch.setattr(blockwise, "CHUNK", 4096)
    pieces = quantize(weight, blocksize=128)
    for name, tensor in whole.tensors().items():
        assert torch.equal(pieces.tensors()[name], tensor), name


def test_every_blocksize_divides_a_chunk() -> None:
    assert all(blockwise.CHUNK % blocksize == 0 for blocksize in BLOCKSIZES)


def test_the_weight_is_left_alone_and_no_graph_is_kept() -> None:
    weight = torch.randn(100, requires_grad=True)
    before = weight.detach().clone()
    assert not dequantize(quantize(weight)).requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("quant_type", "published"),
    [("nf4", PUBLISHED_NF4_ERROR), ("fp4", PUBLISHED_FP4_ERROR)],
    ids=["nf4", "fp4"],
)
def test_mean_error_on_normal_weights_is_the_published_one(quant_type: str, published: dict[int, float]) -> None:
    weight = torch.randn(1024, 1024)
    for blocksize, expected in published.items():
        q = quantize(weight, quant_type=quant_type, blocksize=blocksize, double_quant=False)
        error = (dequantize(q) - weight).abs().double()
        standard_error = error.std().item() / error.numel() ** 0.5
        assert abs(error.mean().item() - expected) < 5 * standard_error


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 64, 99])
def test_a_weight_that_is_not_finite_is_refused(bad: float, at: int) -> None:
    weight = torch.randn(100)
    weight[at] = bad
    with pytest.raises(ValueError, match="finite"):
        quantize(weight)


def test_a_float64_weight_too_large_for_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        quantize(torch.tensor([1e300], dtype=torch.float64))


@pytest.mark.parametrize("blocksize", [0, -64, 16, 63, 100, 8192])
def test_other_blocksizes_are_refused(blocksize: int) -> None:
    with pytest.raises(ValueError, match=f"blocksize must be one of 32, .*4096, got {blocksize}"):
        quantize(torch.randn(10), blocksize=blocksize)


@pytest.mark.parametrize("quant_type", ["nf1", "nf9", "nf", "int8", "NF4", ""])
def test_other_quant_types_are_refused(quant_type: str) -> None:
    with pytest.raises(ValueError, match=f"quant_type must be nf4.*got '{quant_type}'"):
        quantize(torch.randn(10), quant_type=quant_type)


def test_whole_numbers_and_empty_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floating point weight, got torch\.int64"):
        quantize(torch.arange(10))
    with pytest.raises(ValueError, match=r"at least one weight, got shape \(0, 4\)"):
        quantize(torch.empty(0, 4))

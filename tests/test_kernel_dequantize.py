"""kernels/quantize.py and kernels/dequantize.py equal quant/ to the bit: every code book, dtype, odd size and tail."""

import importlib

import pytest
import torch

import kernels
import quant

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
QUANT_TYPES = ["nf4", "fp4", "int4", "nf3", "nf8"]
SHAPES = [(1,), (63,), (64,), (65,), (2, 5, 37), (130, 96)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: unlike its values, they tell 0 from −0."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_dequantize_equals_the_definition(shape: tuple[int, ...], quant_type: str, double_quant: bool) -> None:
    q = quant.quantize(torch.randn(shape), quant_type=quant_type, double_quant=double_quant)
    for dtype in DTYPES:
        expected = quant.dequantize(q, dtype)
        actual = kernels.dequantize(q, dtype)
        assert (actual.shape, actual.dtype) == (expected.shape, dtype)
        assert torch.equal(bits(actual), bits(expected))


@pytest.mark.parametrize("blocksize", quant.BLOCKSIZES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_dequantize_equals_the_definition_at_every_blocksize(blocksize: int) -> None:
    for n in (blocksize - 1, blocksize, 2 * blocksize + 17):
        q = quant.quantize(torch.randn(n), blocksize=blocksize)
        assert torch.equal(bits(kernels.dequantize(q)), bits(quant.dequantize(q)))


@pytest.mark.parametrize("quant_type", ["nf4", "nf3"])
def test_chunks_do_not_show(quant_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("kernels.dequantize")
    monkeypatch.setattr(module, "CHUNK", 128)
    for n in (255, 256, 257, 1000, 1025):
        q = quant.quantize(torch.randn(n), quant_type=quant_type)
        assert torch.equal(kernels.dequantize(q), quant.dequantize(q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_filled_and_returned(dtype: torch.dtype) -> None:
    q = quant.quantize(torch.randn(7, 13))
    out = torch.full((7, 13), float("nan"), dtype=dtype)
    assert kernels.dequantize(q, out=out) is out
    assert torch.equal(out, quant.dequantize(q, dtype))


@pytest.mark.parametrize(
    ("out", "dtype"),
    [
        (torch.empty(13, 7), None),
        (torch.empty(13, 7).T, None),
        (torch.empty(7, 13), torch.float16),
    ],
    ids=["shape", "not contiguous", "dtype"],
)
def test_an_out_that_does_not_fit_is_refused(out: torch.Tensor, dtype: torch.dtype | None) -> None:
    with pytest.raises(ValueError, match=r"out must be contiguous, of shape \(7, 13\)"):
        kernels.dequantize(quant.quantize(torch.randn(7, 13)), dtype, out=out)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_equals_the_definition(dtype: torch.dtype, quant_type: str) -> None:
    weight = torch.randn(5, 67).to(dtype)
    expected = quant.quantize(weight, quant_type=quant_type, blocksize=32).tensors()
    actual = kernels.quantize(weight, quant_type=quant_type, blocksize=32).tensors()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_quantize_has_the_same_errors() -> None:
    with pytest.raises(ValueError, match="finite"):
        kernels.quantize(torch.tensor([float("nan")]))

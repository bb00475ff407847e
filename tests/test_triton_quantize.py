"""kernels/triton/quantize.py equals quant.quantize to the bit, ties, zeros, tails and errors included."""

from __future__ import annotations

import pytest
import torch

import kernels
import quant
from kernels import use_backend
from quant.codebook import codebook

pytest.importorskip("triton", reason="Linux only")
from kernels.triton import launch

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="these run in the interpreter; tests/gpu on a GPU")
TYPES = ["nf4", "fp4", "int4"]


def assert_same(weight: torch.Tensor, **options: object) -> None:
    with use_backend("triton"):
        ours = kernels.quantize(weight, **options)
    expected = quant.quantize(weight, **options)
    for name, tensor in expected.tensors().items():
        assert torch.equal(getattr(ours, name), tensor), name
    assert (ours.shape, ours.dtype, ours.quant_type) == (expected.shape, expected.dtype, expected.quant_type)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "blocksize"), [((1,), 64), ((5, 77), 32), ((3, 7, 5), 64), ((40, 129), 128)])
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_random_weights(quant_type, shape, blocksize, dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    for double_quant in (True, False):
        assert_same(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)


@pytest.mark.parametrize("quant_type", TYPES)
def test_ties_and_their_neighbours(quant_type: str) -> None:
    levels = torch.unique(codebook(quant_type))
    ties = (levels[:-1] + levels[1:]) / 2
    around = torch.cat([ties, ties.nextafter(torch.tensor(2.0)), ties.nextafter(torch.tensor(-2.0)), torch.ones(1)])
    assert_same(around, quant_type=quant_type, blocksize=64)


@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-45, 2.9e-39, 3e-39, 1.2e-38])
def test_blocks_too_small_for_a_reciprocal(tiny: float) -> None:
    assert_same(torch.full((70,), tiny), double_quant=False)


def test_other_widths_go_to_the_definition() -> None:
    assert_same(torch.randn(70), quant_type="nf3")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.randn(200)
    weight[150] = bad
    with use_backend("triton"), pytest.raises(ValueError, match="finite weights, found NaN or infinity"):
        kernels.quantize(weight)


def test_the_errors_are_those_of_the_definition() -> None:
    with use_backend("triton"):
        with pytest.raises(ValueError, match="blocksize must be one of"):
            kernels.quantize(torch.randn(8), blocksize=48)
        with pytest.raises(ValueError, match="needs a floating point weight"):
            kernels.quantize(torch.ones(8, dtype=torch.int32))

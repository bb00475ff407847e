"""quant/tensor.py: what a QuantizedTensor holds, how many bytes that is, and that moving it changes no bit."""

import dataclasses
import math

import pytest
import torch

from quant import QuantizedTensor, dequantize, quantize


def same_bits(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return a.tensors().keys() == b.tensors().keys() and all(
        torch.equal(tensor, b.tensors()[name]) and tensor.dtype == b.tensors()[name].dtype
        for name, tensor in a.tensors().items()
    )


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_per_parameter_of_a_large_weight(double_quant: bool, bits: float) -> None:
    q = quantize(torch.randn(1024, 4096), double_quant=double_quant)
    assert round(q.bits_per_param, 3) == bits


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("n", [1, 65, 64 * 256 + 1])
def test_nbytes_is_the_bytes_of_codes_and_scales(n: int, double_quant: bool) -> None:
    q = quantize(torch.randn(n), double_quant=double_quant)
    codes, n_blocks = math.ceil(n / 2), math.ceil(n / 64)
    scales = n_blocks + 4 * math.ceil(n_blocks / 256) + 4 if double_quant else 4 * n_blocks
    assert q.nbytes == codes + scales
    assert q.bits_per_param == 8 * (codes + scales) / n


@pytest.mark.parametrize("quant_type", ["nf2", "nf3", "nf8"])
def test_other_widths_are_counted_as_the_byte_a_code_that_they_take(quant_type: str) -> None:
    q = quantize(torch.randn(4096), quant_type=quant_type, double_quant=False)
    assert q.packed.shape == (4096,)
    assert q.bits_per_param == 8.5


def test_fields_of_a_double_quantized_weight() -> None:
    q = quantize(torch.randn(5, 7, 11).bfloat16())
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in q.tensors().items()}
    assert described == {
        "packed": (torch.uint8, (193,)),
        "code": (torch.float32, (16,)),
        "absmax_8bit": (torch.uint8, (7,)),
        "absmax_code": (torch.float32, (256,)),
        "absmax2": (torch.float32, (1,)),
        "absmax_offset": (torch.float32, ()),
    }
    assert (q.shape, q.dtype, q.quant_type, q.blocksize, q.blocksize2) == ((5, 7, 11), torch.bfloat16, "nf4", 64, 256)
    assert dequantize(q).shape == (5, 7, 11)


def test_fields_without_double_quantization() -> None:
    q = quantize(torch.randn(100), double_quant=False)
    assert set(q.tensors()) == {"packed", "code", "absmax"}
    assert torch.equal(q.scales(), q.absmax)


def test_scales_are_fp32_whatever_the_weight_was() -> None:
    for double_quant in (True, False):
        scales = quantize(torch.randn(100).half(), double_quant=double_quant).scales()
        assert (scales.dtype, scales.shape) == (torch.float32, (2,))


def test_maps_are_shared_between_layers() -> None:
    first, second = quantize(torch.randn(64)), quantize(torch.randn(128))
    assert first.code.data_ptr() == second.code.data_ptr()
    assert first.absmax_code.data_ptr() == second.absmax_code.data_ptr()


def test_a_quantized_tensor_cannot_be_changed_in_place() -> None:
    q = quantize(torch.randn(64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.blocksize = 128


def test_tensors_taken_out_and_put_back_are_the_same_weight() -> None:
    q = quantize(torch.randn(300))
    copies = {name: tensor.clone() for name, tensor in q.tensors().items()}
    assert same_bits(q.with_tensors(copies), q)
    assert torch.equal(dequantize(q.with_tensors(copies)), dequantize(q))


def test_with_tensors_replaces_only_what_is_named() -> None:
    q = quantize(torch.randn(64), double_quant=False)
    doubled = q.with_tensors({"absmax": q.absmax * 2})
    assert torch.equal(dequantize(doubled), dequantize(q) * 2)


def test_with_tensors_refuses_a_field_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="absmax2"):
        quantize(torch.randn(64), double_quant=False).with_tensors({"absmax2": torch.zeros(1)})


@pytest.mark.parametrize("double_quant", [True, False])
def test_to_another_device_moves_every_tensor_and_shares_the_maps(double_quant: bool) -> None:
    first = quantize(torch.randn(64), double_quant=double_quant).to("meta")  # meta: a second device on every machine
    second = quantize(torch.randn(64), double_quant=double_quant).to("meta")
    assert {tensor.device.type for tensor in first.tensors().values()} == {"meta"}
    assert first.code is second.code
    assert first.absmax_code is second.absmax_code
    assert (first.shape, first.dtype, first.quant_type) == (second.shape, second.dtype, second.quant_type)


def test_to_the_same_device_changes_no_bit() -> None:
    q = quantize(torch.randn(1000))
    assert same_bits(q.to("cpu"), q)


def test_double_quantized_layers_share_the_8_bit_map() -> None:
    first, second = (quantize(torch.randn(4, 64)) for _ in range(2))
    assert first.absmax_code is second.absmax_code

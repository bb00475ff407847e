"""quant/ against bitsandbytes, really run: code books, packed bytes, scales, dequantized bits, and files both ways.

Its oracle for dequantize is its generic PyTorch implementation (`generic_dequantize`) next to its native kernel: on a
CPU with AVX512 the native one reads absmax at row · (K / blocksize), which is the wrong scale once a block crosses
the end of a row. Its CPU departs from the rule for quantizing in two places: a short last block is divided and not
multiplied by the reciprocal, and fp4 has other ties. There, weights keep more than an ulp away from every tie. Index
8 of fp4 is −0 in its kernels and +0 in its Python table: fp4 is compared by value, nf4 by its bits.
"""

import math
from collections.abc import Iterator

import bitsandbytes as bnb
import bitsandbytes.backends.default.ops as default_ops
import bitsandbytes.functional as functional
import pytest
import torch
from safetensors.torch import load, save

import kernels
import quant
from quant import BLOCKSIZES, QuantizedTensor, dequantize, from_bnb_state_dict, quantize, to_bnb_state_dict
from quant.blockwise import unpack
from tests.accuracy import leaf

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_compilation() -> Iterator[None]:
    """Its generic implementations compile themselves: half a minute for the same numbers."""
    with torch.compiler.set_stance("force_eager"):
        yield


def sizes(blocksize: int) -> list[int]:
    return [1, 3, blocksize - 1, blocksize, blocksize + 1, 2 * blocksize + 17, 4 * blocksize]


def away_from_ties(n: int, dtype: torch.dtype, quant_type: str, blocksize: int) -> torch.Tensor:
    """n normal weights whose scaled value is two ulps or more from every midpoint; those that were nearer become 0.

    0 is no tie for nf4. For fp4 it is, between −0 and +0, which compare equal by value.
    """
    weight = torch.randn(n).to(dtype)
    levels = quant.codebook(quant_type).unique()
    middle = ((levels[:-1] + levels[1:]) / 2).double()
    for start in range(0, n, blocksize):
        block = weight[start : start + blocksize]
        scaled = block.double() / block.abs().max().double()
        distance = (scaled[:, None] - middle).abs().amin(dim=1)
        near = distance < 2 * torch.finfo(torch.float32).eps
        block[near & (block.abs() < block.abs().max())] = 0
    return weight


def canonical(packed: torch.Tensor, n: int, quant_type: str) -> torch.Tensor:
    """The n indices; fp4's −0 (index 8) as its 0 (index 0): bitsandbytes uses either for a small weight."""
    indices = unpack(packed.reshape(-1), n)
    return indices.masked_fill(indices == 8, 0) if quant_type == "fp4" else indices


def generic_dequantize(packed: torch.Tensor, state) -> torch.Tensor:
    absmax = (
        functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    )
    code = functional.get_4bit_type(state.quant_type, device="cpu")
    flat = default_ops._dequantize_4bit_compute(
        packed.reshape(-1), absmax, code, state.blocksize, (math.prod(state.shape),), state.dtype
    )
    return flat.view(state.shape)


def native_is_right(shape: tuple[int, ...], blocksize: int) -> bool:
    """Whether its native CPU kernel reads the right scales on every machine: no block crosses the end of a row.

    Measured with AVX512 and blocks of 64: the largest error is 1.04 on N(0, 1) weights (8, 96), 0 on (8, 128).
    """
    return len(shape) > 1 and shape[-1] % blocksize == 0


def same(ours: torch.Tensor, theirs: torch.Tensor, quant_type: str) -> bool:
    """nf4: equal to the bit. fp4: equal to the bit but for the sign of zeros."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if quant_type == "fp4":
        return torch.equal(ours, theirs)
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (ours, theirs)))


def ours_from(packed: torch.Tensor, state) -> QuantizedTensor:
    """A QuantizedTensor with the very tensors of bitsandbytes' state."""
    scales = {"absmax": state.absmax}
    if state.nested:
        scales = {
            "absmax": None,
            "absmax_8bit": state.absmax,
            "absmax_code": state.state2.code,
            "absmax2": state.state2.absmax,
            "absmax_offset": state.offset,
        }
    return QuantizedTensor(
        packed=packed.reshape(-1),
        code=state.code,
        blocksize=state.blocksize,
        shape=tuple(state.shape),
        dtype=state.dtype,
        quant_type=state.quant_type,
        **scales,
    )


def test_this_is_the_version_that_was_studied() -> None:
    assert bnb.__version__ == "0.50.2"


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_books_are_equal_to_the_bit(quant_type: str) -> None:
    assert torch.equal(quant.codebook(quant_type), functional.get_4bit_type(quant_type, device="cpu"))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_are_equal_to_the_bit(signed: bool) -> None:
    assert torch.equal(quant.dynamic_map(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_packed_bytes_and_absmax_are_equal(quant_type: str, blocksize: int, dtype: torch.dtype) -> None:
    for n in sizes(blocksize):
        weight = away_from_ties(n, dtype, quant_type, blocksize)
        ours = quantize(weight, quant_type=quant_type, blocksize=blocksize, double_quant=False)
        packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
        assert torch.equal(ours.absmax, state.absmax)
        assert ours.packed.shape == packed.reshape(-1).shape
        assert torch.equal(canonical(ours.packed, n, quant_type), canonical(packed, n, quant_type))
        if quant_type == "nf4":
            assert torch.equal(ours.packed, packed.reshape(-1)), "to the last, half-filled byte"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_whole_nf4_blocks_need_no_care_about_ties(blocksize: int, dtype: torch.dtype) -> None:
    """Half the weights lie exactly on a midpoint or one ulp beside it."""
    levels = quant.nf4_codebook()
    middle = (levels[:-1] + levels[1:]) / 2
    near = torch.cat([middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))])
    weight = torch.randn(8, blocksize).clamp(-1, 1)
    weight[:, ::2] = near[torch.randint(len(near), (8, blocksize // 2))]
    weight[:, 1] = 1.0
    weight = (weight * torch.tensor([1.0, 0.5, 2.0, 0.7, 1.1, 3.0, 1e-3, 100.0])[:, None]).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    ours = quantize(weight, blocksize=blocksize, double_quant=False)
    assert torch.equal(ours.packed, packed.reshape(-1))
    assert torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_an_all_zero_block_is_stored_alike(quant_type: str) -> None:
    weight = torch.randn(4, 64)
    weight[2] = 0
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    ours = quantize(weight, quant_type=quant_type, double_quant=False)
    assert torch.equal(canonical(ours.packed, 256, quant_type), canonical(packed, 256, quant_type))
    assert torch.equal(ours.absmax, state.absmax)
    assert state.absmax[2] == 0


def test_an_all_zero_last_block_differs_only_in_the_absmax_documented() -> None:
    weight = torch.cat([torch.randn(64), torch.zeros(10)])
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize(weight, double_quant=False)
    assert torch.equal(ours.packed, packed.reshape(-1))
    assert ours.absmax[1] == 0
    assert state.absmax[1] == torch.tensor(1e-38)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_its_states_dequantize_here_to_its_bits(blocksize: int, quant_type: str, nested: bool, dtype) -> None:
    for shape in [(1,), (blocksize + 1,), (3, 2 * blocksize), (5, 96), (2, 3, 34), (7, 2 * blocksize - 1)]:
        weight = torch.randn(shape).to(dtype)
        packed, state = functional.quantize_4bit(
            weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        ours = dequantize(ours_from(packed, state))
        assert ours.dtype == dtype
        assert same(ours, generic_dequantize(packed, state), quant_type)
        if native_is_right(shape, blocksize):
            assert same(ours, functional.dequantize_4bit(packed, state), quant_type)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_states_written_here_dequantize_there_to_the_same_bits(blocksize, quant_type, double_quant, dtype) -> None:
    for shape in [(1,), (blocksize + 1,), (3, 2 * blocksize), (5, 96), (2, 3, 34), (7, 2 * blocksize - 1)]:
        weight = torch.randn(shape).to(dtype)
        ours = quantize(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        stored = to_bnb_state_dict(ours, "w")
        packed = stored.pop("w")
        state = functional.QuantState.from_dict({k.removeprefix("w."): v for k, v in stored.items()}, device="cpu")
        assert (state.nested, state.blocksize, state.quant_type) == (double_quant, blocksize, quant_type)
        assert (state.shape, state.dtype) == (shape, dtype)
        assert same(dequantize(ours), generic_dequantize(packed, state), quant_type)
        if native_is_right(shape, blocksize):
            assert same(dequantize(ours), functional.dequantize_4bit(packed, state), quant_type)


def test_scales_of_the_second_level_are_nearer_than_its_table_finds_them() -> None:
    """Its CPU looks 8-bit codes up in a table of 65,536 bins: absmax2 and offset are equal, some codes a level off."""
    weight = torch.randn(1024, 256)
    ours = quantize(weight)
    _, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert abs(ours.absmax_offset - state.offset) <= 2 * torch.finfo(torch.float32).eps * ours.absmax_offset
    torch.testing.assert_close(ours.absmax2, state.state2.absmax, rtol=1e-5, atol=0)
    steps = (ours.absmax_8bit.int() - state.absmax.int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).double().mean() < 0.01
    plain = quantize(weight, double_quant=False).absmax
    error_there = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset - plain
    assert (ours.scales() - plain).norm() <= error_there.norm() * (1 + 1e-4)


def linear4bit(
    quant_type: str, nested: bool, dtype: torch.dtype, storage: torch.dtype = torch.uint8, in_features: int = 96
) -> bnb.nn.Linear4bit:
    """A bitsandbytes layer with 200 outputs, quantized. It stays in train mode: eval repacks it on AVX512-BF16."""
    dense = torch.nn.Linear(in_features, 200, dtype=dtype)
    layer = bnb.nn.Linear4bit(
        in_features, 200, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    layer.load_state_dict(dense.state_dict())
    layer.weight.data = layer.weight.data.to(dtype)
    return layer.to("cpu")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_state_dict_of_its_layer_is_read_and_written_back_unchanged(quant_type, nested, dtype, storage) -> None:
    layer = linear4bit(quant_type, nested, dtype, storage)
    theirs = load(save(layer.state_dict()))  # through a file, as checkpoints come
    q = from_bnb_state_dict(theirs, "weight")
    assert (q.shape, q.dtype, q.quant_type, q.double_quant) == ((200, 96), dtype, quant_type, nested)
    there = generic_dequantize(layer.weight.data.view(torch.uint8), layer.weight.quant_state)
    assert same(dequantize(q), there, quant_type)

    written = to_bnb_state_dict(q, "weight")
    assert written.keys() == theirs.keys() - {"bias"}
    for key, tensor in written.items():
        same_storage = theirs[key].view(-1).view(torch.uint8) if key == "weight" else theirs[key]
        assert tensor.dtype == same_storage.dtype, key
        assert torch.equal(tensor.reshape(same_storage.shape), same_storage), key
        assert key == "weight" or tensor.shape == theirs[key].shape, key
    if storage == torch.uint8:
        assert written["weight"].shape == theirs["weight"].shape


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_its_layer_loads_what_is_written_here(quant_type: str, double_quant: bool) -> None:
    q = quantize(torch.randn(200, 128).bfloat16(), quant_type=quant_type, double_quant=double_quant)
    stored = load(save(to_bnb_state_dict(q, "weight")))
    parameter = bnb.nn.Params4bit.from_prequantized(
        stored.pop("weight"), {k.removeprefix("weight."): v for k, v in stored.items()}, device="cpu"
    )
    there = functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert same(dequantize(q), there, quant_type)


def test_safetensors_bytes_are_equal_when_both_write_the_same_weight() -> None:
    weight = torch.randn(64, 96).bfloat16()
    layer = linear4bit("nf4", nested=False, dtype=torch.bfloat16)
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=False).to("cpu")
    theirs = {k: v for k, v in layer.state_dict().items() if k != "bias"}
    ours = to_bnb_state_dict(quantize(weight, double_quant=False), "weight")
    assert save(ours) == save({k: v.detach() for k, v in theirs.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_matmul_and_its_gradients_are_those_of_its_layer(quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    layer = linear4bit(quant_type, nested, dtype, in_features=128)  # K % blocksize == 0: see the docstring above
    layer.bias.requires_grad_()
    q = from_bnb_state_dict(layer.state_dict(), "weight")
    x, dy = torch.randn(5, 128).to(dtype), torch.randn(5, 200).to(dtype)
    their_x, our_x, our_bias = leaf(x), leaf(x), leaf(layer.bias.to(dtype))
    theirs = layer(their_x)
    with kernels.use_backend("reference"):  # the same torch product as theirs, so the same bits
        ours = kernels.matmul(our_x, q, our_bias)
    theirs.backward(dy)
    ours.backward(dy)
    assert torch.equal(ours, theirs)
    assert torch.equal(our_x.grad, their_x.grad)
    assert torch.equal(our_bias.grad, layer.bias.grad)

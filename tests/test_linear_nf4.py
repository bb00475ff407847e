"""lora/linear_nf4.py: value and gradient, and bits that no cast, copy, state dict or shard may change."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
import quant
from lora import LinearNF4, LoRAConfig, add_adapter, quantize_model
from lora.linear_nf4 import BYTES, MAPS
from quant.codebook import codebook, dynamic_map
from tests import reference
from tests.accuracy import assert_as_accurate_as, exact, leaf

M, N, K = 3, 6, 33  # 198 weights: three blocks and a tail that crosses rows
OPTIONS = [
    {"quant_type": quant_type, "double_quant": double_quant}
    for quant_type in ("nf4", "fp4", "nf3")
    for double_quant in (True, False)
]


def a_layer(dtype: torch.dtype = torch.float32, **options) -> LinearNF4:
    return LinearNF4.from_weight(torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype), **options)


def bits(layer: LinearNF4) -> dict[str, Tensor]:
    """Every tensor of the quantized weight, copied."""
    return {name: tensor.clone() for name, tensor in layer.quantized.tensors().items()}


def assert_same_bits(layer: LinearNF4, before: dict[str, Tensor]) -> None:
    now = layer.quantized.tensors()
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert now[name].dtype == tensor.dtype, name
        assert torch.equal(now[name], tensor), name


# Value and gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_value_and_gradient(dtype: torch.dtype, options: dict) -> None:
    layer = a_layer(**options)
    x, dy = leaf(torch.randn(M, K).to(dtype)), torch.randn(M, N).to(dtype)
    y = layer(x)
    y.backward(dy)
    plain_x = leaf(x)
    weight = quant.dequantize(layer.quantized, dtype)
    plain_y = F.linear(plain_x, weight, layer.bias.to(dtype))
    plain_y.backward(dy)
    rows, none, ones = weight.tolist(), [], [1.0] * N
    value = reference.lora_linear(x.tolist(), rows, none, layer.bias.tolist(), ones)
    assert_as_accurate_as(plain_y, y, exact(value))
    gradient = reference.lora_linear_gradients(x.tolist(), rows, none, ones, dy.tolist()).x
    assert_as_accurate_as(plain_x.grad, x.grad, exact(gradient))


def test_it_is_the_kernel_on_what_quantize_gives() -> None:
    weight, bias, x = torch.randn(N, K), torch.randn(N), torch.randn(2, M, K)
    layer = LinearNF4.from_weight(weight, bias, quant_type="fp4", blocksize=32, double_quant=False)
    q = quant.quantize(weight, quant_type="fp4", blocksize=32, double_quant=False)
    assert torch.equal(layer(x), kernels.matmul(x, q, bias))
    assert (layer.in_features, layer.out_features) == (K, N)
    assert "fp4" in repr(layer)
    assert "blocksize=32" in repr(layer)


def test_the_identity_gives_the_weight() -> None:
    layer = LinearNF4.from_weight(torch.randn(N, K))
    assert torch.equal(layer(torch.eye(K)).T, quant.dequantize(layer.quantized))


def test_nothing_of_it_is_trained() -> None:
    layer = a_layer()
    assert not any(p.requires_grad for p in layer.parameters())
    assert {name for name, _ in layer.named_parameters()} == {*BYTES, "bias"}
    assert all(getattr(layer, name).dtype == torch.uint8 for name in BYTES)


def test_an_error_of_quantize_comes_through() -> None:
    with pytest.raises(ValueError, match="finite weights"):
        LinearNF4.from_weight(torch.full((N, K), torch.nan))


# Bits


CASTS = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "float64": lambda layer: layer.to(torch.float64),
    "double then half": lambda layer: layer.double().half(),
    "cpu and bf16": lambda layer: layer.to("cpu", torch.bfloat16),
    "deepcopy": copy.deepcopy,
    "deepcopy of a cast": lambda layer: copy.deepcopy(layer.half()),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("nested", [False, True], ids=["layer", "inside a model"])
def test_bits_survive(options: dict, cast: str, nested: bool) -> None:
    layer = a_layer(**options)
    before = bits(layer)
    weight = quant.dequantize(layer.quantized, torch.float64)
    model = CASTS[cast](nn.Sequential(layer, nn.LayerNorm(N)) if nested else layer)
    layer = model[0] if nested else model
    assert_same_bits(layer, before)
    assert torch.equal(quant.dequantize(layer.quantized, torch.float64), weight)


def test_a_cast_reaches_the_bias() -> None:
    layer = a_layer().bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    assert not layer.bias.requires_grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_bits_survive_a_state_dict(options: dict, assign: bool) -> None:
    saved, other = a_layer(**options), a_layer(**options)
    before = bits(saved)
    other.load_state_dict(copy.deepcopy(saved.state_dict()), assign=assign)
    assert_same_bits(other, before)
    assert torch.equal(other.bias, saved.bias)
    x = torch.randn(M, K)
    assert torch.equal(other(x), saved(x))


def test_the_state_dict_shares_nothing_between_layers() -> None:
    """So that safetensors, which refuses shared memory, can store it."""
    model = nn.Sequential(a_layer(), a_layer())
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(addresses) == len(set(addresses)) == 2 * 5  # packed, absmax_8bit, absmax2, absmax_offset, bias


def test_loading_a_state_dict_writes_to_no_code_book() -> None:
    nf4, fp4 = a_layer(), a_layer(quant_type="fp4")
    nf4.load_state_dict(fp4.state_dict())
    assert torch.equal(nf4.code, codebook("nf4"))
    assert codebook("nf4")[0] == -1
    assert dynamic_map()[127] == 0


def test_maps_stay_one_tensor_for_all_layers_through_casts() -> None:
    model = nn.Sequential(a_layer(), a_layer()).half().to("cpu").double()
    for name in MAPS:
        assert getattr(model[0], name).data_ptr() == getattr(model[1], name).data_ptr()


# FSDP2, on two processes


class Shards(nn.Module):
    """A block as a decoder's: 4-bit layers with adapters inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 48), nn.Linear(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def qlora_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    model = add_adapter(quantize_model(nn.Sequential(Shards(), Shards())), LoRAConfig(r=4))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


def in_shards(rank: int, world: int, store: str) -> None:
    """One process of the group. An assertion that fails here fails the test."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{store}")
    whole, model = qlora_blocks(), qlora_blocks()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)

    parameters = dict(model.named_parameters())
    in_bytes = [name for name in parameters if name.endswith(BYTES)]
    assert len(in_bytes) == 2 * 2 * len(BYTES)
    for name in in_bytes:
        assert parameters[name].to_local().numel() * world == parameters[name].numel(), name

    x = torch.randn(4, 64)
    expected_x, found_x = leaf(x.bfloat16()), leaf(x.bfloat16())
    expected, found = whole(expected_x), model(found_x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    expected.float().pow(2).sum().backward()
    found.float().pow(2).sum().backward()
    assert torch.equal(found_x.grad, expected_x.grad)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()

    originals = dict(whole.named_parameters()) | dict(whole.named_buffers())
    for name, now in (parameters | dict(model.named_buffers())).items():
        now = now.full_tensor() if isinstance(now, dist.tensor.DTensor) else now
        assert now.dtype == originals[name].dtype, name
        assert torch.equal(now, originals[name]) == ("lora_" not in name), name
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of the group may outlive it, and then abort an ordinary exit


def test_fsdp2_shards_the_bytes_and_keeps_the_bits(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_shards, args=(2, str(tmp_path / "store")), nprocs=2)

"""kernels/triton: dequantize to the bit; forward, dx and LoRA products and their gradients, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import kernels
import quant
from kernels import LoRATerm, dispatch, use_backend
from tests.accuracy import assert_as_accurate_as, leaf

pytest.importorskip("triton", reason="Linux only")
from kernels.triton import configs, launch, matmul

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="these run in the interpreter; tests/gpu on a GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (M, N, K, block size): one of each below a tile, tails of M and N, a sum cut in parts, blocks of half and twice a tile
SHAPES = [(1, 20, 32, 32), (3, 5, 64, 64), (17, 33, 128, 64), (2, 40, 512, 128)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("shape", "blocksize"), [((1,), 64), ((5, 77), 32), ((3, 7, 5), 64), ((2, 129), 128)])
@pytest.mark.usefixtures("nan_filled_empty")
def test_dequantize_equals_the_definition_to_the_bit(shape, blocksize, double_quant, dtype) -> None:
    for quant_type in ("nf4", "fp4", "int4", "nf3"):
        q = quant.quantize(torch.randn(shape), quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        with use_backend("triton"):
            weight = kernels.dequantize(q, dtype)
        assert torch.equal(weight, quant.dequantize(q, dtype))


def test_dequantize_crosses_blocks_of_scales() -> None:
    q = quant.quantize(torch.randn(300, 64))
    assert q.absmax2.numel() == 2
    with use_backend("triton"):
        assert torch.equal(kernels.dequantize(q, torch.bfloat16), quant.dequantize(q, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "blocksize"), SHAPES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_matmul_and_its_gradients(M: int, N: int, K: int, blocksize: int, dtype: torch.dtype) -> None:
    q = quant.quantize(torch.randn(N, K), blocksize=blocksize, double_quant=M % 2 == 1)
    x, dy, bias = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype), torch.randn(N)
    ours = [leaf(x), leaf(bias)]
    with use_backend("triton"):
        y = kernels.matmul(ours[0], q, ours[1])
    y.backward(dy)
    plain = [leaf(x), leaf(bias)]
    plain_y = F.linear(plain[0], quant.dequantize(q, dtype), plain[1].to(dtype))
    plain_y.backward(dy)
    weight = quant.dequantize(q, torch.float64)
    assert_as_accurate_as(plain_y, y, x.double() @ weight.T + bias.double())
    assert_as_accurate_as(plain[0].grad, ours[0].grad, dy.double() @ weight)
    assert_as_accurate_as(plain[1].grad, ours[1].grad, dy.double().sum(0))


def lora_leaves(M: int, N: int, K: int, ranks: tuple[int, ...], dtype: torch.dtype, own_x: bool):
    leaves = {"x": leaf(torch.randn(M, K).to(dtype)), "bias": leaf(torch.randn(N))}
    for i, r in enumerate(ranks):
        leaves[f"A{i}"], leaves[f"B{i}"] = leaf(torch.randn(r, K)), leaf(torch.randn(N, r))
        if own_x and i == 0:
            leaves[f"x{i}"] = leaf(torch.randn(M, K).to(dtype))
    return leaves


def lora_of(leaves: dict[str, torch.Tensor], q, *, row_scale=None) -> torch.Tensor:
    n = sum(name.startswith("A") for name in leaves)
    terms = [LoRATerm(leaves[f"A{i}"], leaves[f"B{i}"], 0.5 + i, leaves.get(f"x{i}")) for i in range(n)]
    return kernels.lora_matmul(leaves["x"], q, terms, bias=leaves["bias"], row_scale=row_scale)


def copies(leaves: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {name: leaf(t if dtype is None else t.to(dtype)) for name, t in leaves.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K", "ranks", "own_x"),
    [(3, 5, 64, (2,), False), (17, 33, 128, (19,), False), (2, 20, 64, (3, 4), True), (1, 9, 512, (2, 1), False)],
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_lora_matmul_and_its_gradients(M, N, K, ranks, own_x, dtype) -> None:
    q = quant.quantize(torch.randn(N, K))
    leaves, dy = lora_leaves(M, N, K, ranks, dtype, own_x), torch.randn(M, N).to(dtype)
    with use_backend("triton"):
        y = lora_of(leaves, q)
    y.backward(dy)
    plain = copies(leaves)
    with use_backend("reference"):
        plain_y = lora_of(plain, q)
    plain_y.backward(dy)
    wide = copies(leaves, torch.float64)
    with use_backend("reference"):
        wide_y = lora_of(wide, q)
    wide_y.backward(dy.double())
    assert_as_accurate_as(plain_y, y, wide_y.detach())
    for name, tensor in leaves.items():
        assert tensor.grad is not None
        assert_as_accurate_as(plain[name].grad, tensor.grad, wide[name].grad)


def test_a_row_scale_is_composed_with_the_fused_product() -> None:
    q, row_scale = quant.quantize(torch.randn(6, 64)), leaf(torch.rand(6) + 0.5)
    leaves, dy = lora_leaves(3, 6, 64, (2,), torch.float32, False), torch.randn(3, 6)
    with use_backend("triton"):
        lora_of(leaves, q, row_scale=row_scale).backward(dy)
    plain, plain_scale = copies(leaves), leaf(row_scale)
    with use_backend("reference"):
        lora_of(plain, q, row_scale=plain_scale).backward(dy)
    torch.testing.assert_close(row_scale.grad, plain_scale.grad)
    for name in leaves:
        torch.testing.assert_close(leaves[name].grad, plain[name].grad)


def test_adapters_on_a_dense_base_are_composed() -> None:
    base, leaves = torch.randn(5, 64), lora_leaves(3, 5, 64, (2,), torch.float32, False)
    with use_backend("triton"):
        y = lora_of(leaves, base)
    with use_backend("reference"):
        assert torch.equal(y, lora_of(leaves, base))


def test_no_adapters_give_the_base() -> None:
    q, x = quant.quantize(torch.randn(5, 64)), torch.randn(2, 64)
    with use_backend("triton"):
        assert torch.equal(kernels.lora_matmul(x, q, []), kernels.matmul(x, q))


def test_leading_dimensions_strides_and_no_rows() -> None:
    q = quant.quantize(torch.randn(6, 64))
    x = torch.randn(3, 64, 2).transpose(1, 2)
    with use_backend("triton"):
        y = kernels.matmul(x, q)
        assert kernels.matmul(torch.randn(0, 64), q).shape == (0, 6)
        assert kernels.matmul(torch.randn(64), q).shape == (6,)
    torch.testing.assert_close(y, x @ quant.dequantize(q).T)


@pytest.mark.parametrize(
    ("quant_type", "K", "dtype", "reason"),
    [
        ("nf4", 80, torch.float32, "K = 80 is not a multiple of the block size, 64"),
        ("nf3", 64, torch.float32, "nf3 codes are not two to a byte"),
        ("nf4", 64, torch.float64, "activations are torch.float64"),
    ],
)
def test_other_shapes_go_through_dequantize_and_say_so(quant_type, K, dtype, reason, caplog, monkeypatch) -> None:
    q, x = quant.quantize(torch.randn(6, K), quant_type=quant_type), leaf(torch.randn(3, K, dtype=dtype))
    monkeypatch.setattr(dispatch, "_said", set())
    with use_backend("triton"):
        y = kernels.matmul(x, q)
        kernels.matmul(x, q)
    y.backward(torch.ones_like(y))
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [reason] * 1
    weight = quant.dequantize(q, dtype)
    torch.testing.assert_close(y, x @ weight.T)
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ weight)


def test_a_sum_in_parts_gives_the_same_bits_each_time() -> None:
    q, x = quant.quantize(torch.randn(9, 1024)), torch.randn(2, 1024)
    assert configs.split_for(1, 1024 // configs.INTERPRETED.BK, matmul.multiprocessors(x.device)) > 1
    with use_backend("triton"):
        first, again = kernels.matmul(x, q), kernels.matmul(x, q)
    assert torch.equal(first, again)


def test_split_fills_the_multiprocessors_and_no_more() -> None:
    assert configs.split_for(tiles=32, steps=64, multiprocessors=108) == 4
    assert configs.split_for(tiles=400, steps=64, multiprocessors=108) == 1
    assert configs.split_for(tiles=1, steps=9, multiprocessors=108) == 2, "four steps a part"
    assert configs.split_for(tiles=1, steps=10**6, multiprocessors=108) == 16


@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("family", list(configs.FORWARD))
def test_every_tile_of_a_weight_lies_in_a_block(family: str, blocksize: int) -> None:
    for direction in ("forward", "backward"):
        tiles = configs.tiles(direction, family, blocksize)
        assert tiles
        assert all(blocksize % config.BK == 0 for config in tiles)
        assert tiles == sorted(tiles, key=lambda config: config.BM)
        if blocksize == 32 and family in ("wgmma", "tcgen05"):
            assert all(config.BM < 64 for config in tiles)


def test_a_cpu_tensor_outside_the_interpreter_is_refused_in_one_line() -> None:
    code = (
        "import torch, kernels, quant\n"
        "q = quant.quantize(torch.randn(4, 64))\n"
        "for call in (lambda: kernels.dequantize(q), lambda: kernels.matmul(torch.randn(2, 64), q)):\n"
        "    try:\n"
        "        with kernels.use_backend('triton'): call()\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("'triton' was asked for and cannot run" in line and "TRITON_INTERPRET=1" in line for line in lines)

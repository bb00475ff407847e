"""kernels/triton/lookup.py: the inline assembly, run by an emulator over all byte values, against the code books."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.blockwise import unpack
from quant.codebook import codebook
from tests import ptx_emulator

lookup = pytest.importorskip("kernels.triton.lookup", reason="triton is not installed: Linux only")

TYPES = ["nf4", "fp4", "int4"]
HALF = [torch.bfloat16, torch.float16]
BYTES = torch.arange(256, dtype=torch.uint8)
SCALES = torch.tensor([1.0, 0.0731, 3.0e-3, 41.7, 1e-6, 0.0])


def levels(quant_type: str) -> tuple[float, ...]:
    return tuple(codebook(quant_type).tolist())


def words_of(codes: torch.Tensor) -> np.ndarray:
    """uint8 (n,) → little-endian 32-bit words."""
    return codes.numpy().view(np.uint32)


def weights_of(registers: dict[str, np.ndarray], n_words: int, dtype: torch.dtype) -> torch.Tensor:
    """$0 … of every case, in order: (cases, 2 · n_words) in dtype."""
    words = np.stack([registers[f"${i}"] for i in range(n_words)], axis=1)
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int16).copy()).view(dtype)


def every_byte_in_every_place() -> torch.Tensor:
    """(256, 4): row i holds bytes i, i + 64, i + 128, i + 192 (mod 256), so that a place sees all values."""
    return torch.stack([BYTES, BYTES + 64, BYTES + 128, BYTES + 192], dim=1).contiguous()


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_scaled_looks_up_every_byte_with_its_own_scale(quant_type: str, dtype: torch.dtype) -> None:
    codes = every_byte_in_every_place()
    scale = SCALES[torch.randint(len(SCALES), (256, 4))].to(dtype)
    expected = codebook(quant_type).to(dtype)[unpack(codes.view(-1), 2048).int()] * scale.repeat_interleave(2)
    weights = scaled(quant_type, codes, scale)
    assert torch.equal(weights.view(torch.int16), expected.view(256, 8).view(torch.int16))


def scaled(quant_type: str, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 4) and their half-width scales (n, 4) → the weights (n, 8), by the text of `scaled_asm`."""
    pairs = scale.contiguous().view(torch.int16).numpy().view(np.uint32)
    inputs = {"$4": words_of(codes).reshape(-1), "$5": pairs[:, 0], "$6": pairs[:, 1]}
    registers = ptx_emulator.run(lookup.scaled_asm(levels(quant_type), scale.dtype), inputs)
    return weights_of(registers, 4, scale.dtype)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize(("dtype", "capability"), [(torch.bfloat16, 80), (torch.float16, 80), (torch.float16, 75)])
def test_words_equal_the_reference_to_the_bit(quant_type: str, dtype: torch.dtype, capability: int) -> None:
    codes = torch.cat([every_byte_in_every_place().roll(i, 0) for i in range(4)], dim=1).contiguous()
    absmax = SCALES[torch.randint(len(SCALES), (256,))]
    inputs = {f"${16 + i}": words_of(codes).reshape(256, 4)[:, i] for i in range(4)}
    inputs["$20"] = absmax.numpy().view(np.uint32)
    registers = ptx_emulator.run(lookup.words_asm(levels(quant_type), dtype, capability), inputs)
    code = codebook(quant_type)[unpack(codes.view(-1), 256 * 32).int()].view(256, 32)
    expected = (code * absmax[:, None]).to(dtype)
    assert torch.equal(weights_of(registers, 16, dtype).view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_scaled_errs_by_no_more_than_its_three_roundings(dtype: torch.dtype) -> None:
    scale = 0.05 + 0.95 * torch.rand(4096, 4)  # no subnormal in fp16
    codes = torch.randint(256, (4096, 4), dtype=torch.uint8)
    level = codebook("nf4").double()[unpack(codes.view(-1), 8 * 4096).int()].view(4096, 8)
    exact = level * scale.double().repeat_interleave(2, dim=1)
    unit = torch.finfo(dtype).eps / 2
    relative = ((scaled("nf4", codes, scale.to(dtype)).double() - exact) / exact).abs().nan_to_num()
    assert relative.max() <= (1 + unit) ** 3 - 1
    assert relative.max() > 1.5 * unit, "one rounding would do better: the bound is not idle"


def test_the_emulator_knows_prmt() -> None:
    a, b = np.array([0x33221100], np.uint32), np.array([0x77665584], np.uint32)
    assert ptx_emulator._prmt(a, b, np.array([0x7351], np.uint32))[0] == 0x77335511
    assert ptx_emulator._prmt(a, b, np.array([0xC840], np.uint32))[0] == 0xFF008400


def test_a_planted_error_is_seen() -> None:
    text = lookup.scaled_asm(levels("nf4"), torch.bfloat16).replace("0x4051", "0x5140", 1)
    one = np.full(256, 0x3F803F80, np.uint32)
    inputs = {"$4": words_of(every_byte_in_every_place()).reshape(-1), "$5": one, "$6": one}
    right = ptx_emulator.run(lookup.scaled_asm(levels("nf4"), torch.bfloat16), inputs)
    assert any((ptx_emulator.run(text, inputs)[f"${i}"] != right[f"${i}"]).any() for i in range(4))

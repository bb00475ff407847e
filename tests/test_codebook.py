"""quant/codebook.py: NF4, NFk, FP4, INT4 and the dynamic map against their derivations and the published numbers."""

import hashlib

import pytest
import torch

from quant import dynamic_map, fp4_codebook, int4_codebook, nf4_codebook, nfk_codebook
from tests import reference

# QLoRA (arXiv 2305.14314), appendix E
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip

# of the 1,024 little-endian fp32 bytes of bitsandbytes' create_dynamic_map
DYNAMIC_MAP_SHA256 = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}


def test_nf4_is_derived_from_normal_quantiles_to_the_bit() -> None:
    assert nf4_codebook().dtype == torch.float32
    assert nf4_codebook().tolist() == reference.nf_codebook(4, offset=0.9677083)


def test_nf4_is_the_published_table_to_the_bit() -> None:
    assert torch.equal(nf4_codebook(), torch.tensor(PUBLISHED_NF4))


@pytest.mark.parametrize("bits", range(2, 9))
def test_nfk_follows_the_same_derivation(bits: int) -> None:
    tail = (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    levels = nfk_codebook(bits).tolist()
    assert levels == reference.nf_codebook(bits, offset=round(1 - tail, 7))
    assert len(set(levels)) == 2**bits
    assert levels == sorted(levels)
    assert (levels[0], levels[2 ** (bits - 1) - 1], levels[-1]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("bits", [1, 9])
def test_nfk_refuses_widths_it_cannot_store(bits: int) -> None:
    with pytest.raises(ValueError, match=f"between 2 and 8 bits, got {bits}"):
        nfk_codebook(bits)


def test_fp4_has_the_values_and_the_index_order_of_bitsandbytes() -> None:
    assert fp4_codebook().tolist() == reference.fp4_codebook()


def test_int4_is_symmetric_sevenths() -> None:
    sevenths = {reference.f32(k / 7) for k in range(-7, 8)}
    assert set(int4_codebook().tolist()) == sevenths
    assert int4_codebook().shape == (16,)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_the_dynamic_tree(signed: bool) -> None:
    levels = dynamic_map(signed)
    exact = torch.tensor(reference.dynamic_map(signed), dtype=torch.float64)
    # four fp32 roundings a level (two ends, their mean, the decade), half an ulp each
    assert ((levels - exact).abs() <= 2 * torch.finfo(torch.float32).eps * exact.abs()).all()
    assert levels.shape == (256,)
    assert levels.tolist() == sorted(set(levels.tolist()))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes_to_the_bit(signed: bool) -> None:
    assert hashlib.sha256(dynamic_map(signed).numpy().tobytes()).hexdigest() == DYNAMIC_MAP_SHA256[signed]


def test_signed_dynamic_map_has_zero_in_the_middle_and_no_minus_one() -> None:
    levels = dynamic_map(signed=True)
    assert levels[127] == 0.0
    assert levels[255] == 1.0
    assert -1 < levels[0] < -0.99

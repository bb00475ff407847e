"""quant/double_quant.py: 8-bit scales against the loops of tests/reference.py, to the bit."""

import pytest
import torch

from quant import dynamic_map, quantize
from quant.double_quant import dequantize_absmax, nearest_even, quantize_8bit, quantize_absmax
from tests import reference

BLOCK_COUNTS = [1, 2, 255, 256, 257, 600]


def scales_like_a_layer(n: int) -> torch.Tensor:
    """absmax of n blocks of 64 normal weights."""
    return torch.randn(n, 64).abs().amax(dim=1) * 0.02


def scales_over_many_decades(n: int) -> torch.Tensor:
    return torch.randn(n).mul(3).exp()


@pytest.mark.parametrize("n_blocks", BLOCK_COUNTS)
@pytest.mark.parametrize("make", [scales_like_a_layer, scales_over_many_decades])
def test_codes_absmax2_and_offset_equal_the_loops(make, n_blocks: int) -> None:
    absmax, levels = make(n_blocks), dynamic_map()
    absmax_8bit, absmax2, offset = quantize_absmax(absmax, levels)
    expected = reference.double_quantize(absmax.tolist(), levels.tolist())
    assert absmax_8bit.dtype == torch.uint8
    assert absmax_8bit.tolist() == expected.codes
    assert absmax2.tolist() == expected.absmax2
    assert offset.shape == ()
    assert offset.item() == expected.offset


@pytest.mark.parametrize("n_blocks", BLOCK_COUNTS)
def test_restored_scales_equal_the_loops(n_blocks: int) -> None:
    absmax, levels = scales_like_a_layer(n_blocks), dynamic_map()
    absmax_8bit, absmax2, offset = quantize_absmax(absmax, levels)
    state = reference.DoubleQuantized(absmax_8bit.tolist(), absmax2.tolist(), offset.item())
    restored = dequantize_absmax(absmax_8bit, levels, absmax2, offset)
    assert restored.dtype == torch.float32
    assert restored.tolist() == reference.double_dequantize(state, levels.tolist())


def test_quantize_uses_the_same_second_level() -> None:
    weight = torch.randn(300, 64)
    plain, nested = quantize(weight, double_quant=False), quantize(weight, double_quant=True)
    expected = reference.double_quantize(plain.absmax.tolist(), dynamic_map().tolist())
    assert nested.absmax is None
    assert nested.absmax_8bit.tolist() == expected.codes
    assert nested.absmax2.tolist() == expected.absmax2
    assert nested.absmax_offset.item() == expected.offset
    assert nested.scales().tolist() == reference.double_dequantize(expected, dynamic_map().tolist())
    assert torch.equal(nested.packed, plain.packed)


def test_offset_is_summed_in_float64() -> None:
    absmax = torch.tensor([2.0**24, *[1.0] * 255])  # an fp32 sum in index order stays at 2^24
    _, _, offset = quantize_absmax(absmax, dynamic_map())
    assert offset.item() == reference.f32((2**24 + 255) / 256)


@pytest.mark.parametrize("threads", [1, 2])
def test_offset_does_not_change_with_the_thread_count(threads: int) -> None:
    absmax, before = scales_over_many_decades(100_000), torch.get_num_threads()
    expected = reference.double_quantize(absmax.tolist(), dynamic_map().tolist()).offset
    torch.set_num_threads(threads)
    try:
        _, _, offset = quantize_absmax(absmax, dynamic_map())
    finally:
        torch.set_num_threads(before)
    assert offset.item() == expected


def test_a_tie_goes_to_the_even_index() -> None:
    levels = dynamic_map().double()
    middle = (levels[:-1] + levels[1:]) / 2
    is_tie = middle.float().double() == middle  # a midpoint that fp32 holds exactly
    lower = torch.arange(255)[is_tie]
    assert {0, 1} <= set((lower % 2).tolist()), "both parities must occur for this test to say anything"
    chosen = nearest_even(middle[is_tie].float(), dynamic_map())
    assert torch.equal(chosen.long(), lower + lower % 2)


def test_one_ulp_beside_a_tie_goes_to_the_nearer_level() -> None:
    middle = ((dynamic_map().double()[:-1] + dynamic_map().double()[1:]) / 2).float()
    below, above = torch.nextafter(middle, torch.tensor(-2.0)), torch.nextafter(middle, torch.tensor(2.0))
    assert torch.equal(nearest_even(below, dynamic_map()).long(), torch.arange(255))
    assert torch.equal(nearest_even(above, dynamic_map()).long(), torch.arange(1, 256))


def test_a_midpoint_that_fp32_must_round_goes_to_the_level_it_was_rounded_towards() -> None:
    middle = ((dynamic_map().double()[:-1] + dynamic_map().double()[1:]) / 2).float()
    expected = [reference.nearest_code_even(value, dynamic_map().tolist()) for value in middle.tolist()]
    assert nearest_even(middle, dynamic_map()).tolist() == expected


def test_levels_and_both_ends_map_to_themselves() -> None:
    assert torch.equal(nearest_even(dynamic_map(), dynamic_map()).long(), torch.arange(256))
    assert nearest_even(torch.tensor([-1.0]), dynamic_map()).item() == 0  # there is no -1: the lowest level is nearest


def test_one_block_keeps_its_scale_exactly() -> None:
    weight = torch.randn(40)
    q = quantize(weight)
    assert q.absmax2.tolist() == [0.0]
    assert q.absmax_8bit.tolist() == [127]
    assert q.scales().tolist() == [weight.abs().max().item()]


def test_blocks_of_256_have_scales_of_their_own() -> None:
    values = torch.cat([torch.full((256,), 1e-3), torch.full((256,), 1e3), torch.tensor([5.0])])
    indices, absmax2 = quantize_8bit(values, dynamic_map())
    assert absmax2.tolist() == [reference.f32(1e-3), 1e3, 5.0]
    assert indices.unique().tolist() == [255]

"""kernels/adamw: the C step on every instruction set and Triton's in its interpreter against float64; the 8-bit codes
against the exact definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels import use_backend
from kernels.adamw import AdamWStep, adamw, adamw_8bit, dequantize_state, quantize_state
from kernels.cpu import library
from quant import dynamic_map
from tests.accuracy import assert_as_accurate_as

STEP = AdamWStep(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, t=1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


USABLE = library.usable_isas(library.build()) if library.why_missing() is None else ()
try:
    from kernels.triton import launch
except ImportError:  # Linux only
    TRITON = []
else:
    TRITON = ["triton"] if launch.interpreted() else []


@pytest.fixture(params=[*USABLE, *TRITON, "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param in USABLE:
        monkeypatch.setenv("QLORA_CPU_ISA", request.param)
    with use_backend("cpu" if request.param in USABLE else request.param):
        yield request.param


def gradients(n: int, steps: int) -> list[torch.Tensor]:
    """With zeros among them."""
    return [torch.randn(n) * (torch.rand(n) > 0.1) for _ in range(steps)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [255, 4097])
def test_a_step_is_as_accurate_as_torch(n, dtype, backend):
    """Float64 starts from the same rounded gradients and, for each step, the same parameter and state."""
    p, m, v = torch.randn(n).to(dtype), torch.zeros(n), torch.zeros(n)
    for t, g in enumerate(gradients(n, 5), 1):
        step, g = replace(STEP, t=t), g.to(dtype)
        exact = [x.double() for x in (p, m, v)]
        plain = [x.clone() for x in (p, m, v)]
        with use_backend("reference"):
            adamw(exact[0], g.double(), exact[1], exact[2], step)
            adamw(plain[0], g, plain[1], plain[2], step)
        adamw(p, g, m, v, step)
        for ours, theirs, wanted in zip((p, m, v), plain, exact, strict=True):
            assert_as_accurate_as(theirs, ours, wanted)


def test_an_element_does_not_depend_on_its_place_nor_on_threads(backend):
    n = 9001
    p, g, m, v = torch.randn(n), torch.randn(n), torch.randn(n), torch.rand(n)
    whole, parts = ([x.clone() for x in (p, m, v)] for _ in range(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    adamw(whole[0], g, whole[1], whole[2], STEP)
    torch.set_num_threads(threads)
    for start, stop in [(0, 1), (1, 16), (16, 17), (17, 4200), (4200, n)]:
        cut = slice(start, stop)
        adamw(parts[0][cut], g[cut], parts[1][cut], parts[2][cut], STEP)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def eight_bit(n: int) -> list[torch.Tensor]:
    """exp_avg, absmax, exp_avg_sq, absmax_sq of a parameter that never moved: all zeros, as a page is at first."""
    blocks = math.ceil(n / 256)
    codes = [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]
    return [codes[0], torch.zeros(blocks), codes[1], torch.zeros(blocks)]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_exact_nearest_ones_also_at_ties(signed, backend):
    """With β = 0 the new moments are g and g²; a block's largest value 1 leaves the others as they are."""
    levels = dynamic_map(signed)
    middles = ((levels[:-1].double() + levels[1:].double()) / 2).float()
    values = torch.cat([levels, middles, *(torch.nextafter(middles, torch.tensor(x)) for x in (9.0, -9.0))])
    if not signed:
        values = values.clamp(min=0).sqrt()
    values = torch.cat([values, torch.randn(255 * 200).clamp(-1, 1) * (1 if signed else 0.5)])
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    g = torch.cat([torch.ones(len(blocks), 1), blocks], dim=1).flatten()[:-3]
    state = eight_bit(len(g))
    adamw_8bit(torch.zeros(len(g)), g, *state, replace(STEP, beta1=0.0, beta2=0.0))
    moment, scales = (g, state[:2]) if signed else (g * g, state[2:])
    for block in range(len(blocks)):  # by exhaustive search in float64
        part = moment[256 * block : 256 * block + 256].double()
        distance = (part[:, None] - levels.double()[None, :]).abs()
        nearest = distance == distance.amin(dim=1, keepdim=True)
        codes = scales[0][256 * block : 256 * block + 256].long()
        assert nearest.gather(1, codes[:, None]).all()
        tied = nearest.sum(dim=1) == 2
        assert (codes[tied] % 2 == 0).all()
    assert scales[1].eq(1).all()


def test_the_8bit_step_is_the_definition(backend):
    """Codes may differ where two roundings of a moment fall on two sides of a threshold: once in thousands."""
    n = 5000
    p, state = torch.randn(n), eight_bit(n)
    q, other = p.clone(), [x.clone() for x in state]
    for t, g in enumerate(gradients(n, 10), 1):
        adamw_8bit(p, g, *state, replace(STEP, t=t))
        with use_backend("reference"):
            adamw_8bit(q, g, *other, replace(STEP, t=t))
        for codes in (0, 2):
            apart = (state[codes].int() - other[codes].int()).abs()
            assert apart.max() <= 1
            assert (apart > 0).float().mean() <= 1e-3
        torch.testing.assert_close(state[1], other[1])
        for mine, theirs in zip(state, other, strict=True):
            theirs.copy_(mine)
        torch.testing.assert_close(p, q)
        q.copy_(p)


def test_a_block_of_zeros_and_one_too_small_to_invert(backend):
    g = torch.zeros(512)
    g[256:] = 1e-42
    p, state = torch.ones(512), eight_bit(512)
    adamw_8bit(p, g, *state, replace(STEP, weight_decay=0.0))
    assert state[1].eq(0).all()
    assert state[3].eq(0).all()
    assert p.eq(1).all()
    assert p.isfinite().all()


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_comes_back_as_itself(signed):
    levels = dynamic_map(signed)
    codes, absmax = quantize_state(levels * 3.0, signed=signed)
    assert codes.tolist() == list(range(256))
    assert dequantize_state(codes, absmax, signed=signed).equal(levels * 3.0)


def test_what_the_c_step_cannot_serve_goes_to_the_definition_or_is_refused():
    p, m, v = (torch.zeros(4, dtype=torch.float64) for _ in range(3))
    adamw(p, torch.ones(4, dtype=torch.float64), m, v, STEP)
    assert p.lt(0).all()
    if USABLE:
        with use_backend("cpu"), pytest.raises(ValueError, match=r"serves torch.float32.* not torch.float64"):
            adamw(p, torch.ones(4), m, v, STEP)


@pytest.mark.skipif(not USABLE, reason=str(library.why_missing()))
@pytest.mark.parametrize("which", range(4))
def test_state_of_another_dtype_or_with_gaps_is_refused(which):
    p = torch.zeros(300)
    with use_backend("cpu"):
        for wrong in (lambda t: t.double(), lambda t: t.repeat_interleave(2)[::2]):
            state = eight_bit(300)
            state[which] = wrong(state[which])
            with pytest.raises(ValueError, match=r"a C kernel (serves|needs contiguous)"):
                adamw_8bit(p, torch.ones(300), *state, STEP)
            if which < 2:
                moments = [torch.zeros(300), torch.zeros(300)]
                moments[which] = wrong(moments[which])
                with pytest.raises(ValueError, match=r"a C kernel (serves|needs contiguous)"):
                    adamw(p, torch.ones(300), *moments, STEP)


@pytest.mark.parametrize("which", range(6))
def test_tensors_that_do_not_belong_together_are_refused(which, backend):
    """One element short, or in two rows."""
    for wrong in (lambda t: t[:-1], lambda t: t.view(2, -1)):
        call = [torch.zeros(512), torch.ones(512), *eight_bit(512)]
        call[which] = wrong(call[which])
        with pytest.raises(ValueError, match=r"adamw needs tensors of \d+ elements in one row"):
            adamw_8bit(*call, STEP)
        if which < 4:
            call = [torch.zeros(512) for _ in range(4)]
            call[which] = wrong(call[which])
            with pytest.raises(ValueError, match=r"adamw needs tensors of \d+ elements in one row"):
                adamw(*call, STEP)

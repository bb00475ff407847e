"""kernels/cpu/attention, on every instruction set here: values and gradients against float64; threads; refusals."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import use_backend
from kernels.attention import causal_attention
from kernels.cpu import library
from kernels.cpu.attention import CausalAttention, serves
from tests.accuracy import assert_as_accurate_as, leaf

pytestmark = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))
USABLE = library.usable_isas(library.build()) if library.why_missing() is None else ("portable",)


@pytest.fixture(params=USABLE, autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QLORA_CPU_ISA", request.param)
    torch.manual_seed(0)
    with use_backend("cpu"):
        yield


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def inputs(B: int, T: int, H: int, Kv: int, Dh: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v with scores that differ by tens, and dy."""
    return [torch.randn(B, T, n, Dh) * 2 for n in (H, Kv, Kv)], torch.randn(B, T, H, Dh)


@pytest.mark.parametrize(
    "shape", [(2, 1, 2, 1, 32), (2, 13, 2, 2, 64), (1, 300, 6, 2, 32), (1, 601, 2, 1, 96)], ids=str
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_value_and_gradients(shape: tuple[int, int, int, int, int]) -> None:
    tensors, dy = inputs(*shape)
    results = []
    for function, dtype in ((cpu_attention, torch.float32), (plain, torch.float32), (plain, torch.float64)):
        leaves = [leaf(t.to(dtype)) for t in tensors]
        y = function(*leaves)
        y.backward(dy.to(dtype))
        results.append([y, *(t.grad for t in leaves)])
    for ours, torchs, exact in zip(*results, strict=True):
        assert_as_accurate_as(torchs, ours, exact)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    tensors, dy = inputs(3, 40, 4, 2, 32)
    results, threads = [], torch.get_num_threads()
    for n in (1, 3):
        torch.set_num_threads(n)
        leaves = [leaf(t) for t in tensors]
        y = CausalAttention.apply(*leaves)
        y.backward(dy)
        results.append([y, *(t.grad for t in leaves)])
    torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_what_is_not_served_is_left_to_torch() -> None:
    many = 2 * torch.get_num_threads()
    (q, k, v), _ = inputs(many, 32, 2, 1, 32)
    assert serves(q, k, v, None, None)
    assert causal_attention(q, k, v) is not None
    for unserved in ((q[:1], k[:1], v[:1]), (q[..., :20], k[..., :20], v[..., :20]), (q.bfloat16(), k, v)):
        assert causal_attention(*unserved) is None
    with use_backend("reference"):
        assert causal_attention(q, k, v) is None

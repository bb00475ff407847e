"""kernels/cpu/attention, on every instruction set here: values and gradients against float64; documents that share
their beginning; threads and company; refusals."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import use_backend
from kernels.attention import causal_attention
from kernels.cpu import library
from kernels.cpu.attention import CausalAttention, cut, serves
from models import attention as definition
from tests.accuracy import assert_as_accurate_as, leaf

pytestmark = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))
USABLE = library.usable_isas(library.build()) if library.why_missing() is None else ("portable",)

# (document, tokens, the one it continues) in order, 0 for padding: prefixes that several continue, documents of one
# token, and two so long that they are cut, one of which has a prefix
ROWS = (
    [(0, 3, 0), (1, 520, 0), (2, 1, 1), (3, 40, 1), (0, 2, 0), (4, 9, 0), (5, 65, 1)],
    [(7, 9, 0), (3, 530, 7), (2, 1, 7), (1, 86, 0), (0, 14, 0)],
)
T = 640


@pytest.fixture(params=USABLE, autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QLORA_CPU_ISA", request.param)
    torch.manual_seed(0)
    with use_backend("cpu"):
        yield


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: definition.Runs | None = None,
    prefixes: list[int | None] | None = None,
) -> Tensor:
    """The C kernel, whatever `serves` would say."""
    return CausalAttention.apply(q, k, v, cut(*q.shape[:2], runs and tuple(runs), prefixes and tuple(prefixes)))


def inputs(B: int, T: int, H: int, Kv: int, Dh: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v with scores that differ by tens, and dy."""
    return [torch.randn(B, T, n, Dh) * 2 for n in (H, Kv, Kv)], torch.randn(B, T, H, Dh)


def value_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [leaf(t) for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def segment_and_prefix_ids() -> tuple[Tensor, Tensor]:
    """ROWS as int64 (2, T)."""
    segments, prefixes = torch.zeros(2, T, dtype=torch.int64), torch.zeros(2, T, dtype=torch.int64)
    for b, row in enumerate(ROWS):
        start = 0
        for document, tokens, prefix in row:
            segments[b, start : start + tokens], prefixes[b, start : start + tokens] = document, prefix
            start += tokens
        assert start == T
    return segments, prefixes


def documents() -> tuple[definition.Runs, list[int | None], Tensor]:
    """The runs and prefixes of ROWS, and who may attend to whom, bool (2, T, T)."""
    segments, prefix_ids = segment_and_prefix_ids()
    index = torch.arange(T)[None]
    allowed = definition.allowed_pairs(index, segments, index, segments)
    allowed |= (prefix_ids[:, :, None] == segments[:, None]) & (prefix_ids != 0)[:, :, None]
    runs = definition.document_runs(segments)
    assert runs is not None
    return runs, definition.prefix_runs(runs, segments, prefix_ids), allowed


SHAPES = [(2, 13, 2, 2, 64), (1, 300, 6, 2, 32), (1, 601, 2, 1, 96), (1, 1100, 7, 1, 32)]
CASES = [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]


# of one token dq is nothing but noise, which torch's in bf16 has not
@pytest.mark.parametrize(("shape", "dtype"), [((2, 1, 2, 1, 32), torch.float32), *CASES], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_value_and_gradients(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    tensors, dy = inputs(*shape)
    tensors, dy = [t.to(dtype) for t in tensors], dy.to(dtype)
    ours, torchs = (value_and_gradients(function, tensors, dy) for function in (attend, plain))
    exact = value_and_gradients(plain, [t.double() for t in tensors], dy)
    for a, b, wide in zip(ours, torchs, exact, strict=True):
        assert_as_accurate_as(b, a, wide)


@pytest.mark.parametrize("heads", [(3, 3, 32), (6, 2, 64), (3, 1, 96), (2, 2, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_documents_that_share_their_beginning(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against the definition with a mask; padding and its gradients are zeros."""
    runs, prefixes, allowed = documents()
    tensors, dy = inputs(2, T, *heads)
    tensors, dy = [t.to(dtype) for t in tensors], dy.to(dtype)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return definition.attention_reference(q, k, v, allowed)

    ours = value_and_gradients(lambda *t: attend(*t, runs, prefixes), tensors, dy)
    mask = value_and_gradients(masked, tensors, dy)
    exact = value_and_gradients(masked, [t.double() for t in tensors], dy)
    padding = segment_and_prefix_ids()[0] == 0
    for a, b, wide in zip(ours, mask, exact, strict=True):
        assert_as_accurate_as(b, a, wide)
        assert torch.equal(a[padding], torch.zeros_like(a[padding]))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    runs, prefixes, _ = documents()
    tensors, dy = inputs(2, T, 4, 2, 32)
    results, threads = [], torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(value_and_gradients(lambda *t: attend(*t, runs, prefixes), tensors, dy))
    torch.set_num_threads(threads)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_results_do_not_depend_on_the_other_documents() -> None:
    """A document, alone or behind its prefix alone, gives the same bits; but for dk and dv of what others continue."""
    runs, prefixes, _ = documents()
    tensors, dy = inputs(2, T, 4, 2, 32)
    together = value_and_gradients(lambda *t: attend(*t, runs, prefixes), tensors, dy)
    for i, ((row, start, stop), prefix) in enumerate(zip(runs, prefixes, strict=True)):
        before = slice(0, 0) if prefix is None else slice(*runs[prefix][1:])
        *few, few_dy = (torch.cat([t[row, before], t[row, start:stop]])[None] for t in (*tensors, dy))
        P, S = before.stop - before.start, few_dy.shape[1]
        who = ([(0, 0, S)], [None]) if prefix is None else ([(0, 0, P), (0, P, S)], [None, 0])
        alone = value_and_gradients(partial(lambda who, *t: attend(*t, *who), who), few, few_dy)
        for a, b in zip(alone[: 2 if i in prefixes else 4], together, strict=False):
            assert torch.equal(a[0, P:], b[row, start:stop])


@pytest.mark.parametrize("window", [20, 19])
def test_only_windows_that_hold_every_document_are_served(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest document has 15 tokens behind a prefix of 5."""
    segments = torch.tensor([[1] * 5 + [2] * 15 + [3] * 12])
    prefixes, index = torch.tensor([[0] * 5 + [1] * 15 + [0] * 12]), torch.arange(32)[None]
    runs = definition.document_runs(segments)
    assert runs is not None
    (q, k, v), _ = inputs(1, 32, 2, 1, 32)
    continued = torch.where(prefixes != 0, prefixes, segments)
    allowed = definition.allowed_pairs(index, continued, index, continued, window=window)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    masked = []
    torchs = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: masked.append(1) or torchs(*a, **o))
    shared = definition.band(window, dtype=torch.float32)
    y = definition.causal_attention(q, k, v, runs, shared, definition.prefix_runs(runs, segments, prefixes))
    assert len(masked) == (0 if window == 20 else 3)
    exact = definition.attention_reference(q.double(), k.double(), v.double(), allowed)
    assert_as_accurate_as(definition.attention_reference(q, k, v, allowed), y, exact)


def test_what_is_not_served_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (q, k, v), _ = inputs(1, 64, 2, 1, 32)
    runs = ((0, 0, 9), (0, 9, 64))
    assert serves(q, k, v, None, None)
    assert causal_attention(q, k, v) is not None
    assert causal_attention(q, k, v, runs) is not None
    short = (q[:, :31], k[:, :31], v[:, :31])
    halves = (q.half(), k.half(), v.half())
    for unserved in (short, (q[..., :20], k[..., :20], v[..., :20]), (q.bfloat16(), k, v), halves):
        assert causal_attention(*unserved) is None
    assert causal_attention(*short, ((0, 2, 31),)) is not None
    with use_backend("reference"):
        assert causal_attention(q, k, v) is None


def test_few_documents_for_many_threads_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), _ = inputs(1, 64, 2, 1, 32)
    runs = ((0, 0, 9), (0, 9, 64))
    for threads, whole, two in ((2, True, True), (4, False, True), (5, False, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert serves(q, k, v, None, None) is whole
        assert serves(q, k, v, runs, None) is two

"""models/elementwise and recompute: values and gradients against float64 autograd; what is kept for backward; bits."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import rope_tables
from models.elementwise import add, apply_rope, rms_norm, swiglu
from models.recompute import recomputed
from tests.accuracy import assert_as_accurate_as, leaf

DTYPES = [torch.float32, torch.bfloat16]


def rms_plain(x: Tensor, g: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * g


def rotate_plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


COS, SIN = rope_tables(torch.arange(7)[None], torch.tensor([1.0, 0.3, 0.05]), 1.2)
CASES = {
    "rms_norm": (lambda x, g: rms_norm(x, g, 1e-5), rms_plain, [(3, 7, 10), (10,)]),
    "swiglu": (swiglu, lambda a, b: F.silu(a) * b, [(3, 7, 10), (3, 7, 10)]),
    "add": (add, torch.add, [(3, 7, 10), (3, 7, 10)]),
    "apply_rope": (
        lambda x: apply_rope(x, COS, SIN),
        lambda x: rotate_plain(x, COS.to(x.dtype), SIN.to(x.dtype)),
        [(2, 7, 3, 6)],
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_as_accurate_as_autograd_in_the_same_dtype(name, dtype):
    ours, plain, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    results = []
    for function, made in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
        leaves = [leaf(x.to(made)) for x in inputs]
        y = function(*leaves)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype).to(made))
        results.append([y.detach(), *(x.grad for x in leaves)])
    for got, plainly, exact in zip(*results, strict=True):
        assert got.dtype == dtype
        assert_as_accurate_as(plainly, got, exact)


def kept_bytes(y: Tensor) -> int:
    """Bytes of the tensors that the graph of y keeps, each once."""
    seen, stack, storages = set(), [y.grad_fn], {}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        for tensor in getattr(node, "saved_tensors", ()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def test_each_keeps_its_inputs_alone():
    x, g = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    assert kept_bytes(rms_norm(x, g, 1e-5)) == x.nbytes + g.nbytes + 5 * 4
    a, b = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    assert kept_bytes(swiglu(a, b)) == a.nbytes + b.nbytes
    heads = torch.randn(1, 7, 3, 6, requires_grad=True)
    assert kept_bytes(apply_rope(heads, COS, SIN)) == COS.nbytes + SIN.nbytes


def test_a_recomputed_tensor_is_made_once_for_all_its_users_and_gives_the_same_gradients():
    torch.manual_seed(0)
    x, g = torch.randn(5, 8, requires_grad=True), torch.randn(8)
    weights = [torch.randn(4, 8, requires_grad=True) for _ in range(3)]
    made = []

    def again() -> Tensor:
        made.append(1)
        return rms_norm(x, g, 1e-5)

    h = rms_norm(x, g, 1e-5)
    sum(F.linear(h, w).sin().sum() for w in weights).backward()
    wanted = [t.grad.clone() for t in (x, *weights)]
    for t in (x, *weights):
        t.grad = None

    h = rms_norm(x, g, 1e-5)
    with recomputed(h, again):
        outputs = [F.linear(h, w) for w in weights]
    h.detach().fill_(torch.nan)  # nobody may read it any more
    del h
    loss = sum(y.sin().sum() for y in outputs)
    assert not made
    loss.backward(retain_graph=True)
    assert len(made) == 1
    for t, grad in zip((x, *weights), wanted, strict=True):
        assert torch.equal(t.grad, grad)
    loss.backward()
    assert len(made) == 2
    for t, grad in zip((x, *weights), wanted, strict=True):
        assert torch.equal(t.grad, 2 * grad)


def test_nothing_is_recomputed_unless_asked():
    x = torch.randn(5, 8, requires_grad=True)
    h = x.exp()
    with recomputed(h, lambda: pytest.fail("was made again"), when=False):
        (h * h).sum().backward()
    assert torch.equal(x.grad, 2 * h.detach() * h.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_of_16_bits_is_computed_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    """300² is infinity in fp16: squared there, a row with an outlier (SmolLM2's reach 19 000) came out as zeros."""
    torch.manual_seed(0)
    results = []
    x, g, dy = (torch.randn(shape).to(dtype) for shape in ((5, 64), (64,), (5, 64)))
    x[:, 3] = 300
    for made in (dtype, torch.float32):
        leaves = [leaf(t.to(made)) for t in (x, g)]
        y = rms_norm(*leaves, 1e-5)
        y.backward(dy.to(made))
        results.append([t.to(dtype) for t in (y.detach(), *(t.grad for t in leaves))])
    for got, wide in zip(*results, strict=True):
        assert torch.equal(got, wide)

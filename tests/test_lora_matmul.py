"""kernels/lora_matmul.py: base and low-rank terms together against float64 loops, forward and each gradient."""

import pytest
import torch
from torch.nn import functional as F

import kernels
import quant
from kernels import LoRATerm
from tests import reference
from tests.accuracy import assert_as_accurate_as, exact, leaf
from tests.test_matmul import saved_by

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 5, 7, 2), (4, 17, 129, 3)]  # (M, N, K, r)
# In half precision the error of a single number says nothing: it may be 0 by luck.
CASES = [(*shape, dtype) for shape in SHAPES for dtype in DTYPES] + [(1, 1, 1, 1, torch.float32)]


def plain_lora(x, weight, terms, bias, row_scale):
    """The same math, composed from PyTorch's own operations."""
    bias = None if bias is None else bias.to(x.dtype)
    y = F.linear(x, weight.to(x.dtype), bias if row_scale is None else None)
    for term in terms:
        own = x if term.x is None else term.x
        y = y + term.scaling * F.linear(F.linear(own, term.A.to(x.dtype)), term.B.to(x.dtype))
    if row_scale is not None:
        y = y * row_scale.to(x.dtype) + (0 if bias is None else bias)
    return y


def a_case(M, N, K, r, dtype, *, adapters, dropped, scaled, with_bias):
    """Leaves by name. Adapters are fp32 whatever the activations are, as in training."""
    leaves = {"x": leaf(torch.randn(M, K).to(dtype))}
    for i in range(adapters):
        leaves[f"A{i}"], leaves[f"B{i}"] = leaf(torch.randn(r, K)), leaf(torch.randn(N, r))
        if dropped:
            leaves[f"x{i}"] = leaf(F.dropout(leaves["x"].detach(), 0.3))
    if with_bias:
        leaves["bias"] = leaf(torch.randn(N))
    if scaled:
        leaves["row_scale"] = leaf(torch.rand(N) + 0.5)
    return leaves


def terms_of(leaves: dict[str, torch.Tensor]) -> list[LoRATerm]:
    count = sum(name.startswith("A") for name in leaves)
    return [LoRATerm(leaves[f"A{i}"], leaves[f"B{i}"], 0.5 + i, leaves.get(f"x{i}")) for i in range(count)]


def by_loops(leaves, weight, dy):
    """Value, and gradient by name."""
    N = len(weight)
    x = leaves["x"].tolist()
    terms = [
        reference.Term(t.A.tolist(), t.B.tolist(), t.scaling, x if t.x is None else t.x.tolist())
        for t in terms_of(leaves)
    ]
    bias = leaves["bias"].tolist() if "bias" in leaves else [0.0] * N
    row_scale = leaves["row_scale"].tolist() if "row_scale" in leaves else [1.0] * N
    y = reference.lora_linear(x, weight, terms, bias, row_scale)
    g = reference.lora_linear_gradients(x, weight, terms, row_scale, dy)
    gradients = {"x": exact(g.x), "bias": exact(g.bias), "row_scale": exact(g.row_scale)}
    for i, (d_a, d_b, d_x) in enumerate(g.terms):
        gradients |= {f"A{i}": exact(d_a), f"B{i}": exact(d_b), f"x{i}": exact(d_x)}
        if f"x{i}" not in leaves:
            gradients["x"] = gradients["x"] + exact(d_x)
    return exact(y), {name: gradients[name] for name in leaves}


@pytest.mark.parametrize(("M", "N", "K", "r", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("quantized", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize(
    ("adapters", "dropped", "scaled", "with_bias"),
    [(0, 0, 0, 0), (1, 0, 0, 0), (1, 0, 0, 1), (1, 1, 0, 1), (2, 0, 0, 1), (2, 1, 1, 1), (1, 0, 1, 0), (0, 0, 1, 1)],
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_value_and_every_gradient(M, N, K, r, dtype, quantized, adapters, dropped, scaled, with_bias) -> None:
    base = torch.randn(N, K)
    base = quant.quantize(base) if quantized else base.to(dtype)
    weight = quant.dequantize(base) if quantized else base
    ours = a_case(M, N, K, r, dtype, adapters=adapters, dropped=dropped, scaled=scaled, with_bias=with_bias)
    plain = {name: leaf(tensor) for name, tensor in ours.items()}
    dy = torch.randn(M, N).to(dtype)

    y = kernels.lora_matmul(ours["x"], base, terms_of(ours), bias=ours.get("bias"), row_scale=ours.get("row_scale"))
    y.backward(dy)
    plain_y = plain_lora(plain["x"], weight, terms_of(plain), plain.get("bias"), plain.get("row_scale"))
    plain_y.backward(dy)

    expected_y, expected = by_loops(ours, weight.tolist(), dy.tolist())
    assert_as_accurate_as(plain_y, y, expected_y)
    for name in ours:
        assert ours[name].grad.dtype == ours[name].dtype, name
        assert_as_accurate_as(plain[name].grad, ours[name].grad, expected[name])


def test_b_zero_is_the_base_to_the_bit() -> None:
    q, x = quant.quantize(torch.randn(6, 10)), torch.randn(3, 10)
    term = LoRATerm(torch.randn(2, 10), torch.zeros(6, 2), 2.0)
    assert torch.equal(kernels.lora_matmul(x, q, [term]), kernels.matmul(x, q))
    assert torch.equal(kernels.lora_matmul(x, q, []), kernels.matmul(x, q))


def test_qlora_is_lora_on_the_dequantized_weight_to_the_bit() -> None:
    q, x = quant.quantize(torch.randn(6, 10)), torch.randn(3, 10)
    term = LoRATerm(torch.randn(2, 10), torch.randn(6, 2), 2.0)
    assert torch.equal(kernels.lora_matmul(x, q, [term]), kernels.lora_matmul(x, quant.dequantize(q), [term]))


def test_two_adapters_are_one_adapter_of_both_ranks() -> None:
    x, base = torch.randn(3, 10).double(), torch.randn(6, 10).double()
    a, b = (LoRATerm(torch.randn(2, 10).double(), torch.randn(6, 2).double(), s) for s in (2.0, 0.5))
    both = LoRATerm(torch.cat([a.A, b.A]), torch.cat([a.B * a.scaling, b.B * b.scaling], dim=1), 1.0)
    torch.testing.assert_close(kernels.lora_matmul(x, base, [a, b]), kernels.lora_matmul(x, base, [both]))


def test_leading_dimensions_are_rows() -> None:
    q, x = quant.quantize(torch.randn(6, 10)), torch.randn(2, 3, 10)
    term = LoRATerm(torch.randn(2, 10), torch.randn(6, 2), 2.0, x * 2)
    y = kernels.lora_matmul(x, q, [term], bias=torch.zeros(6), row_scale=torch.ones(6))
    in_rows = term._replace(x=x.view(6, 10) * 2)
    torch.testing.assert_close(y.view(6, 6), kernels.lora_matmul(x.view(6, 10), q, [in_rows]))


@pytest.mark.parametrize("quantized", [True, False], ids=["nf4", "dense"])
def test_gradcheck(quantized: bool) -> None:
    weight = torch.randn(3, 5)
    base = quant.quantize(weight) if quantized else leaf(weight.double())
    tensors = [leaf(torch.randn(s).double()) for s in ((2, 5), (2, 5), (1, 5), (3, 1), (3,), (3,))]

    def function(x, own_x, A, B, bias, row_scale, *_):
        terms = [LoRATerm(A, B, 0.7), LoRATerm(A, B, 0.3, own_x)]
        return kernels.lora_matmul(x, base, terms, bias=bias, row_scale=row_scale)

    assert torch.autograd.gradcheck(function, tensors if quantized else [*tensors, base])


def test_backward_keeps_neither_a_dequantized_weight_nor_the_product_of_b_and_a() -> None:
    q, x = quant.quantize(torch.randn(48, 80)), leaf(torch.randn(2, 80))
    term = LoRATerm(leaf(torch.randn(4, 80)), leaf(torch.randn(48, 4)), 2.0)
    _, saved = saved_by(lambda: kernels.lora_matmul(x, q, [term], bias=leaf(torch.zeros(48))))
    assert saved
    assert max(t.numel() for t in saved) < 48 * 80


def test_a_frozen_base_gets_no_gradient() -> None:
    base, term = torch.randn(6, 10), LoRATerm(leaf(torch.randn(2, 10)), leaf(torch.randn(6, 2)), 2.0)
    kernels.lora_matmul(torch.randn(3, 10), base, [term]).sum().backward()
    assert base.grad is None
    assert term.A.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("A", "B"), [((2, 9), (6, 2)), ((2, 10), (5, 2)), ((2, 10), (6, 3))], ids=["A's K", "B's N", "rank"]
)
def test_an_adapter_that_does_not_fit_is_refused(A: tuple[int, int], B: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"A \(r, 10\) and B \(6, r\)"):
        kernels.lora_matmul(torch.randn(3, 10), torch.randn(6, 10), [LoRATerm(torch.randn(A), torch.randn(B), 1.0)])


def test_an_x_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x \(…, 10\)"):
        kernels.lora_matmul(torch.randn(3, 9), torch.randn(6, 10), [])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("own", r"own x must be of x's shape, \(3, 10\), got \(1, 10\)"),
        ("bias", r"bias must be \(6,\), got \(1,\)"),
        ("row_scale", r"row_scale must be \(6,\), got \(1,\)"),
    ],
)
def test_what_a_kernel_would_read_past_the_end_of_is_refused(part: str, message: str) -> None:
    term = LoRATerm(torch.randn(2, 10), torch.randn(6, 2), 1.0, torch.randn(1, 10) if part == "own" else None)
    others = {} if part == "own" else {part: torch.ones(1)}
    with pytest.raises(ValueError, match=message):
        kernels.lora_matmul(torch.randn(3, 10), torch.randn(6, 10), [term], **others)


@pytest.mark.parametrize("quantized", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_updates_smaller_than_the_last_bit_of_y_are_not_lost(quantized: bool, backend: str) -> None:
    """In bf16: rounded once, their mean over many outputs comes through; added to a rounded y, most of them are."""
    torch.manual_seed(0)
    K, N = 64, 4096
    base = torch.randn(N, K).bfloat16()
    if quantized:
        base = quant.quantize(base)
    x = torch.randn(4, K).bfloat16()
    A, B = torch.randn(2, K), 1e-4 * torch.randn(N, 2)
    update = (x.double() @ A.double().T) @ B.double().T
    with kernels.use_backend(backend):
        change = (kernels.lora_matmul(x, base, [LoRATerm(A, B, 1.0)]) - kernels.lora_matmul(x, base, [])).double()
    share = (change * update).sum() / update.pow(2).sum()  # 1 where the update arrives whole, on the average
    assert abs(share - 1) < 0.3
    y = kernels.lora_matmul(x, base, [])
    lost = ((y + update.bfloat16()) - y).double()
    assert (lost * update).sum() / update.pow(2).sum() < 0.3

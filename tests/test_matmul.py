"""kernels/matmul.py: x · Ŵᵀ + b and its gradients against float64 loops, and that only the packed weight is kept."""

import gc

import pytest
import torch
from torch.nn import functional as F

import kernels
import quant
from tests import reference
from tests.accuracy import assert_as_accurate_as, exact, leaf

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 5, 7), (1, 33, 64), (4, 17, 129), (9, 64, 32)]  # (M, N, K): blocks end inside rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.usefixtures("nan_filled_empty")
def test_value_and_gradients(M: int, N: int, K: int, dtype: torch.dtype, with_bias: bool) -> None:
    q = quant.quantize(torch.randn(N, K))
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    bias = torch.randn(N).to(dtype) if with_bias else None

    ours_x, ours_b = leaf(x), None if bias is None else leaf(bias)
    ours = kernels.matmul(ours_x, q, ours_b)
    ours.backward(dy)
    plain_x, plain_b = leaf(x), None if bias is None else leaf(bias)
    plain = F.linear(plain_x, quant.dequantize(q, dtype), plain_b)
    plain.backward(dy)

    weight = quant.dequantize(q, torch.float32).tolist()
    loops_bias = bias.tolist() if with_bias else [0.0] * N
    y = reference.lora_linear(x.tolist(), weight, [], loops_bias, [1.0] * N)
    grads = reference.lora_linear_gradients(x.tolist(), weight, [], [1.0] * N, dy.tolist())
    assert_as_accurate_as(plain, ours, exact(y))
    assert_as_accurate_as(plain_x.grad, ours_x.grad, exact(grads.x))
    if with_bias:
        assert_as_accurate_as(plain_b.grad, ours_b.grad, exact(grads.bias))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4", "nf3"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_identity_gives_the_weight_and_its_transpose_in_backward(quant_type: str, double_quant: bool) -> None:
    q = quant.quantize(torch.randn(24, 40), quant_type=quant_type, double_quant=double_quant)
    weight, eye = quant.dequantize(q), leaf(torch.eye(40))
    y = kernels.matmul(eye, q)
    y.backward(torch.eye(40, 24))
    assert torch.equal(y, weight.T)
    assert torch.equal(eye.grad[:24], weight)


def test_leading_dimensions_are_rows() -> None:
    q, x = quant.quantize(torch.randn(6, 10)), torch.randn(2, 3, 10)
    bias = torch.randn(6)
    in_batch, in_rows = leaf(x), leaf(x.view(6, 10))
    y = kernels.matmul(in_batch, q, bias)
    assert y.shape == (2, 3, 6)
    torch.testing.assert_close(y.view(6, 6), kernels.matmul(in_rows, q, bias))
    y.sum().backward()
    kernels.matmul(in_rows, q, bias).sum().backward()
    torch.testing.assert_close(in_batch.grad.view(6, 10), in_rows.grad)
    assert kernels.matmul(torch.randn(10), q, bias).shape == (6,)


def test_gradcheck() -> None:
    q = quant.quantize(torch.randn(3, 5))
    x, bias = leaf(torch.randn(2, 5).double()), leaf(torch.randn(3).double())
    assert torch.autograd.gradcheck(lambda x, bias: kernels.matmul(x, q, bias), (x, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_fp32_bias_gets_an_fp32_gradient(dtype: torch.dtype) -> None:
    q, bias = quant.quantize(torch.randn(8, 16)), leaf(torch.randn(8))
    dy = torch.randn(300, 8).to(dtype)
    y = kernels.matmul(torch.randn(300, 16).to(dtype), q, bias)
    y.backward(dy)
    assert (y.dtype, bias.grad.dtype) == (dtype, torch.float32)
    plain = leaf(bias)
    plain.expand(300, 8).backward(dy.float())
    assert_as_accurate_as(plain.grad, bias.grad, dy.double().sum(dim=0))


def test_x_without_gradient_is_served_and_computes_none() -> None:
    q, bias = quant.quantize(torch.randn(4, 8)), leaf(torch.randn(4))
    x = torch.randn(2, 8)
    kernels.matmul(x, q, bias).sum().backward()
    assert x.grad is None
    assert bias.grad.tolist() == [2.0] * 4
    assert not kernels.matmul(x, q).requires_grad


def float_tensors_alive(numel: int) -> int:
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum(t.numel() == numel and t.is_floating_point() for t in tensors)


def saved_by(function) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result of `function`, and every tensor that autograd keeps for its backward."""
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return function(), saved


def test_backward_keeps_only_the_packed_weight() -> None:
    q, x = quant.quantize(torch.randn(48, 80)), leaf(torch.randn(2, 80))
    before = float_tensors_alive(48 * 80)
    y, saved = saved_by(lambda: kernels.matmul(x, q))
    assert float_tensors_alive(48 * 80) == before
    assert all(t.numel() < 48 * 80 for t in saved)
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, quant.QuantizedTensor)]
    assert [h is q for h in held] == [True], "the graph holds q itself and no second copy"


def test_the_probes_above_do_see_a_kept_weight() -> None:
    q, x = quant.quantize(torch.randn(48, 80)), leaf(torch.randn(2, 80))
    before = float_tensors_alive(48 * 80)
    kept = quant.dequantize(q)
    assert float_tensors_alive(48 * 80) > before
    _, saved = saved_by(lambda: F.linear(x, kept))
    assert any(t.numel() == 48 * 80 for t in saved)


@pytest.mark.parametrize("shape", [(4, 9), (4,), (0, 4)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x \(…, K\) and a quantized weight \(N, K\)"):
        kernels.matmul(torch.randn(shape), quant.quantize(torch.randn(5, 8)))


@pytest.mark.parametrize("length", [1, 4, 6])
@pytest.mark.parametrize("grad", [True, False])
def test_a_bias_of_another_length_is_refused(length: int, grad: bool) -> None:
    """A C or Triton kernel would read past its end."""
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=rf"bias must be \(5,\), got \({length},\)"):
        kernels.matmul(torch.randn(3, 8), quant.quantize(torch.randn(5, 8)), torch.zeros(length))


def test_a_weight_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 8\)"):
        kernels.matmul(torch.randn(4, 8), quant.quantize(torch.randn(2, 3, 8)))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_casts_the_weight_and_gives_each_gradient_in_its_own_dtype(dtype, weight_dtype) -> None:
    x, weight, bias = torch.randn(3, 4, 9).to(dtype), torch.randn(7, 9).to(weight_dtype), torch.randn(7)
    dy = torch.randn(3, 4, 7).to(dtype)
    ours = [leaf(t) for t in (x, weight, bias)]
    y = kernels.linear(*ours)
    y.backward(dy)
    plain = [leaf(t) for t in (x, weight, bias)]
    plain_y = F.linear(plain[0], plain[1].to(dtype), plain[2].to(dtype))
    plain_y.backward(dy)

    rows, loops_dy = x.flatten(0, 1).tolist(), dy.flatten(0, 1).tolist()
    ones = [1.0] * 7
    expected_y = reference.lora_linear(rows, weight.tolist(), [], bias.tolist(), ones)
    grads = reference.lora_linear_gradients(rows, weight.tolist(), [], ones, loops_dy)
    d_weight = reference.matmul_t(reference.transpose(loops_dy), reference.transpose(rows))
    assert_as_accurate_as(plain_y, y, exact(expected_y).view(3, 4, 7))
    expected = [exact(grads.x).view(3, 4, 9), exact(d_weight), exact(grads.bias)]
    for a, b, e in zip(plain, ours, expected, strict=True):
        assert_as_accurate_as(a.grad, b.grad, e)


def test_linear_keeps_no_cast_copy_of_the_weight() -> None:
    x, weight = leaf(torch.randn(2, 80).bfloat16()), leaf(torch.randn(48, 80))
    _, saved = saved_by(lambda: kernels.linear(x, weight))
    of_its_size = {t.data_ptr() for t in saved if t.numel() == 48 * 80}
    assert of_its_size <= {weight.data_ptr()}


def test_linear_gradcheck() -> None:
    tensors = [leaf(torch.randn(shape).double()) for shape in ((2, 5), (3, 5), (3,))]
    assert torch.autograd.gradcheck(kernels.linear, tensors)

"""lora/linear.py: the layer's value and every gradient against float64 loops, its start, its dropout.

M rows, N out_features, K in_features, r rank.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quant
from kernels import LoRATerm
from lora import AdapterState, LinearNF4, LoRAConfig, LoRALinear
from tests import reference
from tests.accuracy import assert_as_accurate_as, exact, leaf
from tests.test_lora_matmul import plain_lora

M, N, K = 5, 6, 10
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def a_base(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear | LinearNF4:
    layer = nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False)
    return layer if kind == "dense" else LinearNF4.from_weight(layer.weight, layer.bias)


def a_layer(base: nn.Module, *names: str, active: tuple[str, ...] = (), **options) -> LoRALinear:
    """Adapters of r = 3 whose B is no longer zero, with scalings 2, 3, …; all active unless told."""
    layer = LoRALinear(base, AdapterState(active=active or names))
    for i, name in enumerate(names):
        layer.add(name, LoRAConfig(r=3, alpha=6 + 3 * i, **options), "q_proj")
        nn.init.normal_(layer.lora_B[name])
    return layer


def weight_of(base: nn.Module) -> Tensor:
    return quant.dequantize(base.quantized) if isinstance(base, LinearNF4) else base.weight


def by_loops(
    layer: LoRALinear, x: Tensor, terms: list[LoRATerm], dropout: float, dy: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value, and the gradients of x, and of A and B of each term."""
    weight, bias, ones = weight_of(layer.base_layer).tolist(), layer.base_layer.bias.tolist(), [1.0] * N
    listed = [
        reference.Term(t.A.tolist(), t.B.tolist(), t.scaling, (x if t.x is None else t.x).tolist()) for t in terms
    ]
    g = reference.lora_linear_gradients(x.tolist(), weight, listed, ones, dy.tolist())
    gradients = {"x": exact(g.x)}
    for i, (d_a, d_b, d_x) in enumerate(g.terms):
        gradients |= {f"A{i}": exact(d_a), f"B{i}": exact(d_b)}
        kept = 1 if terms[i].x is None else (terms[i].x != 0).double() / (1 - dropout)
        gradients["x"] = gradients["x"] + exact(d_x) * kept
    return exact(reference.lora_linear(x.tolist(), weight, listed, bias, ones)), gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids=["one", "two"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.usefixtures("nan_filled_empty")
def test_value_and_every_gradient(dtype: torch.dtype, kind: str, names: tuple[str, ...], dropout: float) -> None:
    layer = a_layer(a_base(kind, dtype), *names, dropout=dropout)
    x, dy = leaf(torch.randn(M, K).to(dtype)), torch.randn(M, N).to(dtype)
    torch.manual_seed(7)
    y = layer(x)
    y.backward(dy)

    plain_x = leaf(x)
    plain = [LoRATerm(leaf(layer.lora_A[n]), leaf(layer.lora_B[n]), layer.scaling[n]) for n in names]
    torch.manual_seed(7)
    if dropout:
        plain = [term._replace(x=F.dropout(plain_x, dropout)) for term in plain]
    plain_y = plain_lora(plain_x, weight_of(layer.base_layer), plain, layer.base_layer.bias, None)
    plain_y.backward(dy)

    assert layer.scaling == dict(zip(names, (2.0, 3.0), strict=False))
    value, gradients = by_loops(layer, x, plain, dropout, dy)
    assert_as_accurate_as(plain_y, y, value)
    assert_as_accurate_as(plain_x.grad, x.grad, gradients["x"])
    for i, name in enumerate(names):
        assert_as_accurate_as(plain[i].A.grad, layer.lora_A[name].grad, gradients[f"A{i}"])
        assert_as_accurate_as(plain[i].B.grad, layer.lora_B[name].grad, gradients[f"B{i}"])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_new_adapter_changes_no_bit(dtype: torch.dtype, kind: str, bias: bool, init: str) -> None:
    base, x = a_base(kind, dtype, bias), torch.randn(M, K).to(dtype)
    layer = LoRALinear(base, AdapterState(active=("a",)))
    layer.add("a", LoRAConfig(init=init, dropout=0.5), "q_proj")
    assert torch.equal(layer.train()(x), base(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qlora_is_lora_on_the_dequantized_weight_to_the_bit(dtype: torch.dtype) -> None:
    """Value and gradients."""
    quantized = a_layer(a_base("nf4", dtype), "a")
    dense = nn.Linear(K, N, dtype=dtype).requires_grad_(False)
    dense.weight.copy_(weight_of(quantized.base_layer))
    dense.bias.copy_(quantized.base_layer.bias)
    twin = a_layer(dense, "a")
    twin.load_state_dict(quantized.state_dict(), strict=False)
    inputs = [leaf(torch.randn(2, M, K).to(dtype))]
    inputs.append(leaf(inputs[0]))
    outputs = [layer(x) for layer, x in zip((quantized, twin), inputs, strict=True)]
    for y in outputs:
        y.float().pow(2).sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(*(x.grad for x in inputs))
    assert torch.equal(quantized.lora_A["a"].grad, twin.lora_A["a"].grad)
    assert torch.equal(quantized.lora_B["a"].grad, twin.lora_B["a"].grad)


def test_only_the_adapter_gets_a_gradient() -> None:
    for kind in ("dense", "nf4"):
        layer = a_layer(a_base(kind), "a")
        layer(torch.randn(M, K)).sum().backward()
        assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A.a", "lora_B.a"}


def test_an_adapter_is_fp32_on_a_base_of_any_dtype_and_so_are_its_gradients() -> None:
    layer = a_layer(a_base("dense", torch.bfloat16), "a")
    y = layer(torch.randn(M, K).bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A["a"].dtype == layer.lora_A["a"].grad.dtype == torch.float32
    assert layer.lora_B["a"].dtype == layer.lora_B["a"].grad.dtype == torch.float32


def test_the_update_is_proportional_to_alpha() -> None:
    base, x = a_base("dense"), torch.randn(M, K)
    layer = a_layer(base, "a")
    update = layer(x) - base(x)
    layer.scaling["a"] *= 4  # a power of two: exact
    torch.testing.assert_close(layer(x) - base(x), 4 * update)
    assert update.abs().min() > 0


def test_kaiming_is_uniform_within_one_over_the_root_of_in_features() -> None:
    layer = LoRALinear(nn.Linear(400, 8), AdapterState())
    layer.add("a", LoRAConfig(r=100), "q_proj")
    A, bound = layer.lora_A["a"].detach(), 1 / math.sqrt(400)
    n = A.numel()
    assert A.abs().max() <= bound
    assert A.abs().max() > bound * (1 - 20 / n)  # e⁻²⁰ against
    assert abs(A.var().item() / (bound**2 / 3) - 1) < 5 * math.sqrt(0.8 / n)  # 5σ: (kurtosis − 1) / n, kurtosis 9/5
    assert abs(A.mean().item()) < 5 * bound / math.sqrt(3 * n)
    assert not layer.lora_B["a"].any()


def test_gaussian_has_standard_deviation_one_over_r() -> None:
    layer = LoRALinear(nn.Linear(400, 8), AdapterState())
    layer.add("a", LoRAConfig(r=50, init="gaussian"), "q_proj")
    A = layer.lora_A["a"].detach() * 50
    n = A.numel()
    assert abs(A.var().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs(A.mean().item()) < 5 / math.sqrt(n)
    assert not layer.lora_B["a"].any()


def test_dropout_acts_in_training_only() -> None:
    x = torch.randn(M, K)
    layer, without = a_layer(a_base("dense"), "a", dropout=0.5), a_layer(a_base("dense"), "a")
    without.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), without(x))
    assert not torch.equal(layer.train()(x), without(x))


def test_dropout_leaves_the_base_path_alone() -> None:
    """y − base(x) is s · B A applied to x with whole entries gone and the rest divided by 1 − p."""
    p, x = 0.5, torch.ones(1, K)
    layer = a_layer(a_base("dense"), "a", dropout=p)
    layer.lora_A["a"].data = torch.eye(3, K)
    layer.lora_B["a"].data = torch.eye(N, 3)
    update = (layer(x) - layer.base_layer(x))[0, :3] / layer.scaling["a"]
    for kept in update:
        assert min(abs(kept), abs(kept - 1 / (1 - p))) < 1e-5
    layers = [(layer(x) - layer.base_layer(x))[0, :3].abs() > 0.1 for _ in range(20)]
    assert 0 < torch.stack(layers).float().mean() < 1


def test_with_dropout_the_mean_is_the_layer_without() -> None:
    p, n = 0.3, 20_000
    layer = a_layer(a_base("dense"), "a", dropout=p).double()
    x = torch.randn(1, K).double()
    y = layer(x.expand(n, K))
    error = (y.mean(dim=0) - layer.eval()(x)[0]).abs()
    assert (error < 5 * y.std(dim=0) / math.sqrt(n)).all()
    assert (y.std(dim=0) > 0).all()


def test_two_adapters_drop_out_apart() -> None:
    """Each draws a mask of its own: with equal weights their updates differ."""
    layer = a_layer(a_base("dense"), "a", "b", dropout=0.5)
    x = torch.randn(M, K)
    terms = layer.terms(x)
    assert not torch.equal(terms[0].x, terms[1].x)


def test_terms_without_an_input_are_the_plain_ones() -> None:
    """What an output head takes: it has no input to drop."""
    layer = a_layer(a_base("dense"), "a", "b", active=("b",), dropout=0.5)
    (term,) = layer.terms()
    assert term.x is None
    assert term.A is layer.lora_A["b"]
    assert term.B is layer.lora_B["b"]
    assert term.scaling == 3.0


def test_an_active_adapter_that_this_layer_does_not_have_adds_nothing() -> None:
    layer = a_layer(a_base("dense"), "a", active=("elsewhere",))
    x = torch.randn(M, K)
    assert torch.equal(layer(x), layer.base_layer(x))

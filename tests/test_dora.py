"""lora/dora.py: W' = m ⊙ V / ‖V‖, forward and gradients against float64 math; merging; what is refused."""

import math

import pytest
import torch
from torch import Tensor, nn

import kernels
from lora import LoRAConfig, add_adapter, disabled_adapters, merge_adapter, quantize_model, set_adapter
from lora.adapters import lora_layers
from lora.dora import row_norms, sum_norms
from tests.accuracy import assert_as_accurate_as

N, K, R = 48, 64, 4


def layer(quantized: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N))
    if quantized:
        quantize_model(model)
    return add_adapter(model, LoRAConfig(r=R, alpha=6, use_dora=True))


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def weight_of(model: nn.Module) -> Tensor:
    base = model[0].base_layer
    return kernels.dequantize(base.quantized) if hasattr(base, "quantized") else base.weight.detach()


def written_out(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, m: Tensor, s: float) -> Tensor:
    """Equation 5, row by row, the norm a constant."""
    V = W + s * B @ A
    norm = V.detach().square().sum(1).sqrt()
    return torch.stack([m[n] / norm[n] * (x @ V[n]) + bias[n] for n in range(len(m))], dim=-1)


@pytest.mark.parametrize("quantized", [False, True])
def test_forward_and_gradients(quantized: bool) -> None:
    model = randomized(layer(quantized))
    x = torch.randn(5, K, requires_grad=True)
    up = torch.randn(5, N)
    model(x).backward(up)
    held = model[0]
    leaves = {
        "A": held.lora_A["default"],
        "B": held.lora_B["default"],
        "m": held.lora_magnitude_vector["default"],
        "x": x,
    }

    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        own = {key: leaf.detach().to(dtype).requires_grad_() for key, leaf in leaves.items()}
        W, bias = weight_of(model).to(dtype), held.base_layer.bias.detach().to(dtype)
        y = written_out(own["x"], W, bias, own["A"], own["B"], own["m"], 6 / R)
        y.backward(up.to(dtype))
        return {"y": y.detach()} | {key: leaf.grad for key, leaf in own.items()}

    exact, same_math = gradients(torch.float64), gradients(torch.float32)
    ours = {"y": model(x).detach()} | {key: leaf.grad for key, leaf in leaves.items()}
    for key, value in ours.items():
        assert_as_accurate_as(same_math[key], value, exact[key])


@pytest.mark.parametrize("quantized", [False, True])
def test_it_starts_as_the_base_and_is_off_when_off(quantized: bool) -> None:
    model = layer(quantized)
    x = torch.randn(3, K)
    base = model[0].base_layer(x).detach()
    exact = x.double() @ weight_of(model).double().T + model[0].base_layer.bias.double()
    assert_as_accurate_as(base, model(x).detach(), exact)
    with disabled_adapters(randomized(model)):
        assert torch.equal(model(x), base)


def test_norms_of_a_sum_without_the_sum() -> None:
    torch.manual_seed(3)
    W, A, B = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    exact = (W.double() + 1.5 * B.double() @ A.double()).norm(dim=1)
    direct = (W + 1.5 * B @ A).norm(dim=1)
    found = sum_norms(W, row_norms(W), A, B, 1.5)
    # of three terms in place of one: a few more roundings of squares as large as theirs
    limit = 8 * torch.finfo(torch.float32).eps * float((W.norm(dim=1) + 1.5 * (B @ A).norm(dim=1)).max())
    assert float((found - exact).abs().max()) <= max(limit, 2 * float((direct - exact).abs().max()))


def test_an_all_zero_row_is_no_nan() -> None:
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    model[0].weight.data[3] = 0
    add_adapter(model, LoRAConfig(r=R, use_dora=True))
    y = model(torch.randn(2, K))
    assert torch.equal(y[:, 3], torch.zeros(2))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("quantized", [False, True])
def test_merged_it_gives_the_same(quantized: bool) -> None:
    model = randomized(layer(quantized)).eval()
    x = torch.randn(4, K)
    before, exact = model(x).detach(), None
    held = model[0]
    with torch.no_grad():
        pieces = (held.lora_A["default"], held.lora_B["default"], held.lora_magnitude_vector["default"])
        W, bias = weight_of(model).double(), held.base_layer.bias.double()
        exact = written_out(x.double(), W, bias, *(piece.double() for piece in pieces), 6 / R)
    report = merge_adapter(model)
    assert_as_accurate_as(before, model(x).detach(), exact)
    assert report.total_error < math.sqrt(K) * torch.finfo(torch.float32).eps * 10


def test_norms_are_measured_again_after_training() -> None:
    """In eval mode they are kept for the same A and B: a write past autograd, as C kernels do, shows after train()."""
    model = randomized(layer(False)).eval()
    x = torch.randn(2, K)
    before = model(x)
    model[0].lora_B["default"].data.numpy()[:] *= 3.0
    model.train().eval()
    fresh = randomized(layer(False)).eval()
    fresh[0].lora_B["default"].data.mul_(3.0)
    assert torch.equal(model(x), fresh(x))
    assert not torch.equal(model(x), before)


def test_refused_beside_another_on_embeddings_on_the_head_and_with_a_start_out_of_the_weight() -> None:
    model = layer(False)
    add_adapter(model, LoRAConfig(r=2), "plain")
    with pytest.raises(
        ValueError, match=r"adapter 'default' \(DoRA\) scales whole rows of 0: \['plain'\] cannot be on"
    ):
        set_adapter(model, ["default", "plain"])
    table = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 4), "lm_head": nn.Linear(4, 5)})
    for name in table:
        with pytest.raises(ValueError, match=f"use_dora is for linear layers inside the model, not for {name}"):
            add_adapter(table, LoRAConfig(r=2, use_dora=True, target_modules=[name]))
    assert not lora_layers(table)
    with pytest.raises(ValueError, match="use_dora measures the base's weight, which init pissa changes"):
        LoRAConfig(use_dora=True, init="pissa")

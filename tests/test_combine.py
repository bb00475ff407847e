"""lora/combine.py: cat is the exact sum, svd the best of its rank, ties as in its paper; what is refused."""

import pytest
import torch
from torch import Tensor, nn

from lora import LoRAConfig, add_adapter, combine_adapters
from lora.combine import ties

K, N = 20, 12


def two_adapters() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))
    add_adapter(model, LoRAConfig(r=3, alpha=6), "a")
    add_adapter(model, LoRAConfig(r=2, alpha=1, target_modules=["0"]), "b")
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_()
    return model.eval()


def delta(layer: nn.Module, name: str) -> Tensor:
    return layer.scaling[name] * layer.lora_B[name].detach().double() @ layer.lora_A[name].detach().double()


def test_cat_is_the_exact_sum() -> None:
    model = two_adapters()
    wanted = 0.7 * delta(model[0], "a") - 0.5 * delta(model[0], "b")
    combine_adapters(model, ["a", "b"], [0.7, -0.5], name="both")
    assert model.adapter_state.active == ("both",)
    assert [layer.lora_A["both"].shape[0] for layer in model] == [5, 3]
    # the weights go into B, rounded once
    eps = torch.finfo(torch.float32).eps
    assert float((delta(model[0], "both") - wanted).norm()) < 4 * eps * float(wanted.norm())
    assert float((delta(model[1], "both") - 0.7 * delta(model[1], "a")).norm()) < 4 * eps * float(wanted.norm())


def test_svd_is_the_best_of_its_rank() -> None:
    model = two_adapters()
    whole = delta(model[0], "a") + delta(model[0], "b")
    combine_adapters(model, ["a", "b"], method="svd", r=2)
    found = delta(model[0], "combined")
    singular = torch.linalg.svdvals(whole)
    assert float((found - whole).norm()) == pytest.approx(float(singular[2:].norm()), rel=1e-5)  # Eckart and Young
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == 2
    full = two_adapters()
    combine_adapters(full, ["a", "b"], method="svd", r=5)
    assert torch.allclose(delta(full[0], "combined"), whole, atol=1e-5)


def by_the_paper(deltas: Tensor, weights: list[float], density: float) -> Tensor:
    """Trim, elect, merge, number by number."""
    flat = [d.flatten().tolist() for d in deltas]
    kept = []
    for row in flat:
        order = sorted(range(len(row)), key=lambda i: -abs(row[i]))[: int(density * len(row))]
        kept.append([row[i] if i in order else 0.0 for i in range(len(row))])
    merged = []
    for column in zip(*kept, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [w * x for w, x in zip(weights, column, strict=True) if x * sign > 0]
        merged.append(sum(agreeing) / max(1, len(agreeing)))
    return torch.tensor(merged, dtype=torch.float64).view_as(deltas[0])


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties(density: float) -> None:
    torch.manual_seed(2)
    deltas = torch.randn(3, N, K, dtype=torch.float64)
    weights = [1.0, 0.5, 2.0]
    found = ties(deltas, torch.tensor(weights, dtype=torch.float64)[:, None, None], density)
    assert torch.allclose(found, by_the_paper(deltas, weights, density), rtol=1e-12, atol=0)
    model = two_adapters()
    wanted = by_the_paper(torch.stack([delta(model[0], "a"), delta(model[0], "b")]), [1, 1], density)
    combine_adapters(model, ["a", "b"], method="ties", density=density, r=N)
    assert torch.allclose(delta(model[0], "combined"), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"names": ["a"]}, r"needs two adapters or more, each once, got \['a'\]"),
        ({"names": ["a", "a"]}, "needs two adapters or more, each once"),
        ({"names": ["a", "c"]}, "no adapter is named 'c'"),
        ({"weights": [1.0]}, "needs a weight for each of 2 adapters, got 1"),
        ({"method": "linear"}, "method must be one of cat, svd, ties, got 'linear'"),
        ({"r": 4}, "cat is exact, and its rank the sum of theirs"),
        ({"method": "svd", "r": 0}, "r must be at least 1, got 0"),
        ({"method": "ties", "density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
        ({"name": "a"}, "an adapter named 'a' is on this model already"),
    ],
)
def test_refused(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        combine_adapters(two_adapters(), **{"names": ["a", "b"], **options})


def test_what_is_more_than_a_and_b_is_refused() -> None:
    model = two_adapters()
    add_adapter(model, LoRAConfig(r=2, use_dora=True), "scaled")
    with pytest.raises(ValueError, match=r"adapter 'a' at 0 is more than A and B"):
        combine_adapters(model, ["a", "scaled"])

"""Several adapters into one. Each is an update ΔW_i = s_i · B_i A_i, and has a weight w_i.

    cat     Σ w_i ΔW_i, exactly, in the rank Σ r_i:  A = [A_1; A_2; …],  B = [w_1 s_1 B_1, w_2 s_2 B_2, …]
    svd     the same sum, cut to its r largest singular directions:  B = U_r S_r,  A = V_rᵀ
    ties    (arXiv 2306.01708) of each ΔW_i the share `density` of entries that are largest stays; where they differ in
            sign, the sign with more in sum wins; those that have it are weighted and averaged; then svd to rank r

The new adapter's scaling is 1. Left out: PEFT's `linear`, which sums A and B apart: (Σ √(w s) B_i)(Σ √(w s) A_i) has
cross terms B_i A_j, and is no combination of the updates.
"""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .adapters import adapter_layers, adapter_state, check_known
from .attach import attach, check_name
from .config import LoRAConfig
from .linear import LoRALinear
from .sites import Sites

METHODS = ("cat", "svd", "ties")


def combine_adapters(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    name: str = "combined",
    method: str = "cat",
    r: int | None = None,
    density: float = 0.2,
) -> nn.Module:
    """Add adapter `name`, the combination of `names` by `weights` (1 each), and make it active. Returns the model.

    r: of the result, for svd and ties; by default the largest of theirs. density: for ties. Raises ValueError for
    fewer than two names, unknown ones, weights of another number, another method, or an adapter that is more than
    A and B on linear layers.
    """
    weights = [1.0] * len(names) if weights is None else list(weights)
    check_known(adapter_state(model), *names)
    check_name(model, name)
    _check(names, weights, method, r, density)
    layers = _layers(model, names)
    r = r or max(layer.lora_A[n].shape[0] for layer in layers.values() for n in names if n in layer.lora_A)
    parts = {path: _combined(layer, names, weights, method, r, density) for path, layer in layers.items()}
    ranks = {path: A.shape[0] for path, (A, _) in parts.items()}
    attach(model, _config(ranks), name, Sites(tuple(parts)))
    with torch.no_grad():
        for path, (A, B) in parts.items():
            layers[path].lora_A[name].copy_(A)
            layers[path].lora_B[name].copy_(B)
    return model


@torch.no_grad()
def _combined(
    layer: LoRALinear, names: Sequence[str], weights: Sequence[float], method: str, r: int, density: float
) -> tuple[Tensor, Tensor]:
    """(A, B) of the combination on one layer, of scaling 1."""
    here = [(n, w) for n, w in zip(names, weights, strict=True) if n in layer.lora_A]
    if method == "cat":
        A = torch.cat([layer.lora_A[n] for n, _ in here])
        return A, torch.cat([w * layer.scaling[n] * layer.lora_B[n] for n, w in here], 1)
    deltas = torch.stack([layer.scaling[n] * (layer.lora_B[n] @ layer.lora_A[n]) for n, _ in here])
    by = torch.tensor([w for _, w in here], device=deltas.device)[:, None, None]
    return truncated((deltas * by).sum(0) if method == "svd" else ties(deltas, by, density), r)


def truncated(delta: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, K) and B (N, r) whose product is the matrix of rank r nearest to delta (N, K)."""
    U, S, Vt = torch.linalg.svd(delta.float(), full_matrices=False)
    return Vt[:r], U[:, :r] * S[:r]


def ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """deltas (n, N, K), weights (n, 1, 1) → (N, K): trim, elect a sign, average those that agree."""
    kept = torch.stack([_largest(delta, density) for delta in deltas])
    elected = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agrees = kept.sign() == elected
    return (kept * weights * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _largest(delta: Tensor, density: float) -> Tensor:
    """delta with all but the share `density` of its entries, the largest by size, set to 0."""
    places = delta.abs().flatten().topk(int(density * delta.numel())).indices
    flat = torch.zeros_like(delta).flatten()
    flat[places] = delta.flatten()[places]
    return flat.view_as(delta)


def _layers(model: nn.Module, names: Sequence[str]) -> dict[str, LoRALinear]:
    """The layers that have one of these adapters. Raises ValueError where it is more than A and B on a linear layer."""
    found = {}
    for path, layer in adapter_layers(model).items():
        here = [name for name in names if name in layer.adapters]
        if not here:
            continue
        plain = isinstance(layer, LoRALinear) and not layer.started
        extra = (layer.trained_bias, layer.lora_magnitude_vector) if isinstance(layer, LoRALinear) else ()
        if not plain or any(name in held for name in here for held in extra):
            raise ValueError(
                f"adapter {here[0]!r} at {path} is more than A and B on a linear layer: it cannot be combined"
            )
        found[path] = layer
    return found  # type: ignore[return-value]  # plain ones are LoRALinear


def _config(ranks: dict[str, int]) -> LoRAConfig:
    """r and alpha alike, layer by layer, so that scaling is 1."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {re.escape(path): rank for path, rank in ranks.items() if rank != r}
    return LoRAConfig(r=r, alpha=r, rank_pattern=pattern, alpha_pattern=pattern, target_modules=tuple(ranks))


def _check(names: Sequence[str], weights: Sequence[float], method: str, r: int | None, density: float) -> None:
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError(f"combining needs two adapters or more, each once, got {list(names)}")
    if len(weights) != len(names):
        raise ValueError(f"combining needs a weight for each of {len(names)} adapters, got {len(weights)}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "cat" and r is not None:
        raise ValueError("cat is exact, and its rank the sum of theirs: r is for svd and ties")
    if r is not None and r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")

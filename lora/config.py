"""What an adapter is: its rank, its scaling, and the layers it sits on. Names and defaults a PEFT user knows."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

INITS = ("kaiming", "gaussian")


@dataclass(frozen=True)
class LoRAConfig:
    """Raises ValueError for values that make no adapter, or that this version does not support."""

    r: int = 16
    """Rank: columns of B, rows of A."""
    alpha: float = 16
    """LoRA's α. The update is scaled by alpha / r, so that r can change without retuning the learning rate."""
    dropout: float = 0.0
    """Probability of dropping an input of A, in training."""
    target_modules: str | Sequence[str] = "all-linear"
    """all-linear (every linear layer but the output head), a list of names (q_proj), or a regex of the full path."""
    exclude_modules: str | Sequence[str] = ()
    """Left out of the targets: a list of names or a regex."""
    bias: str = "none"
    """Which biases of the base are trained: none."""
    use_rslora: bool = False
    """Scale by alpha / √r instead (arXiv 2312.03732): keeps the update's size as r grows."""
    use_dora: bool = False
    init: str = "kaiming"
    """A at the start: kaiming (uniform ±1/√in_features, as PEFT and the LoRA code) or gaussian (N(0, 1/r²)). B is 0."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Another r for the layers whose path ends in, or matches, a key."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: Sequence[int] | None = None
    """Only these layer numbers."""
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            _require(type(r) is int and r > 0, f"LoRA rank {name} must be a whole number above 0, got {r!r}")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            _require(math.isfinite(alpha) and alpha > 0, f"LoRA {name} must be above 0, got {alpha!r}")
        _require(0 <= self.dropout < 1, f"LoRA dropout must lie in [0, 1), got {self.dropout}")
        _require(self.init in INITS, f"LoRA init must be one of {', '.join(INITS)}, got {self.init!r}")
        _require(self.bias == "none", f"LoRA bias must be 'none' in this version, got {self.bias!r}")
        _require(not self.use_dora, "use_dora=True is not supported in this version")
        _require(
            not self.modules_to_save, f"modules_to_save is not supported in this version, got {self.modules_to_save}"
        )
        for pattern in (self.target_modules, self.exclude_modules):
            if isinstance(pattern, str):
                _compiled(pattern)

    def rank(self, path: str) -> int:
        """r of the layer at `path`."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        """alpha / r of the layer at `path`, or alpha / √r with rsLoRA."""
        r = self.rank(path)
        return _by_pattern(self.alpha_pattern, path, self.alpha) / (math.sqrt(r) if self.use_rslora else r)

    def targets(self, path: str) -> bool:
        """Whether the linear layer at `path` gets an adapter. The output head is not asked about."""
        wanted = self.target_modules == "all-linear" or matches(self.target_modules, path)
        if not wanted or (self.exclude_modules and matches(self.exclude_modules, path)):
            return False
        return self.layers_to_transform is None or _layer_number(path) in self.layers_to_transform


def matches(pattern: str | Sequence[str], path: str) -> bool:
    """PEFT's rule: a string is a regex for the whole path; a list holds paths or their last parts."""
    if isinstance(pattern, str):
        return _compiled(pattern).fullmatch(path) is not None
    return any(path == name or path.endswith("." + name) for name in pattern)


def _by_pattern(patterns: Mapping[str, object], path: str, default):  # type: ignore[no-untyped-def]  # int or float
    """PEFT's rule for rank_pattern: the first key that, as a regex, matches the end of the path."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _layer_number(path: str) -> int | None:
    """The first whole number in the path, which in `model.layers.3.mlp.up_proj` is 3."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found.group(1)) if found else None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"target_modules must be a regex when it is a string, got {pattern!r}: {error}") from None


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)

"""What an adapter is: its rank, its scaling, and the layers it sits on. Names and defaults a PEFT user knows."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

INITS = ("kaiming", "gaussian")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """Raises ValueError for values that make no adapter, or that this version does not support."""

    r: int = 16
    """Rank: columns of B, rows of A."""
    alpha: float = 16
    """LoRA's α. The update is scaled by alpha / r, so that r can change without retuning the learning rate."""
    dropout: float = 0.0
    """Probability of dropping an input of A, in training."""
    target_modules: str | Sequence[str] = ALL_LINEAR
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
    """Only these layer numbers, for target_modules that are not a regex."""
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._check_patterns()
        for name, r in [("r", self.r), *self.rank_pattern.items()]:
            _require(type(r) is int and r > 0, f"LoRA rank {name} must be a whole number above 0, got {r!r}")
        for name, alpha in [("alpha", self.alpha), *self.alpha_pattern.items()]:
            _require(_is_number(alpha) and alpha > 0, f"LoRA {name} must be above 0, got {alpha!r}")
        is_rate = _is_number(self.dropout) and 0 <= self.dropout < 1
        _require(is_rate, f"LoRA dropout must lie in [0, 1), got {self.dropout!r}")
        _require(self.init in INITS, f"LoRA init must be one of {', '.join(INITS)}, got {self.init!r}")
        _require(self.bias == "none", f"LoRA bias must be 'none' in this version, got {self.bias!r}")
        _require(not self.use_dora, "use_dora=True is not supported in this version")
        _require(
            not self.modules_to_save, f"modules_to_save is not supported in this version, got {self.modules_to_save}"
        )

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            _require(isinstance(pattern, Mapping), f"LoRA {name} must map regexes to values, got {pattern!r}")
        for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            names = [patterns] if isinstance(patterns, str) else patterns
            is_names = isinstance(names, Iterable) and all(isinstance(p, str) for p in names)
            _require(is_names, f"LoRA {name} must be a regex or a list of names, got {patterns!r}")
            if isinstance(patterns, str | Mapping):
                for regex in names:
                    _check_regex(name, regex)
        layers = self.layers_to_transform
        if layers is not None:
            is_list = isinstance(layers, Sequence) and all(type(number) is int for number in layers)
            _require(is_list, f"LoRA layers_to_transform must be a list of layer numbers, got {layers!r}")
            is_regex = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
            _require(not is_regex, "LoRA layers_to_transform needs a list in target_modules: a regex names the layers")

    def rank(self, path: str) -> int:
        """r of the layer at `path`."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        """alpha / r of the layer at `path`, or alpha / √r with rsLoRA."""
        r = self.rank(path)
        return _by_pattern(self.alpha_pattern, path, self.alpha) / (math.sqrt(r) if self.use_rslora else r)

    def targets(self, path: str) -> bool:
        """Whether the linear layer at `path` gets an adapter. The output head is not asked about."""
        if self.exclude_modules and matches(self.exclude_modules, path):
            return False
        if not isinstance(self.target_modules, str) and path in self.target_modules:
            return True  # named in full: layers_to_transform does not apply
        wanted = self.target_modules == ALL_LINEAR or matches(self.target_modules, path)
        return wanted and (not self.layers_to_transform or _layer_number(path) in self.layers_to_transform)


def matches(pattern: str | Sequence[str], path: str) -> bool:
    """PEFT's rule: a string is a regex for the whole path; a list holds paths or their last parts."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(path == name or path.endswith("." + name) for name in pattern)


def _by_pattern(patterns: Mapping[str, object], path: str, default):  # type: ignore[no-untyped-def]  # int or float
    """PEFT's rule for rank_pattern: the first key that, as a regex, matches the end of the path."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _layer_number(path: str) -> int | None:
    """3 in `model.layers.3.mlp.up_proj`. PEFT's rule: the first whole number that has two names before it."""
    found = re.search(r"\.[^.]*\.(\d+)\.", path)
    return int(found.group(1)) if found else None


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"LoRA {name} must hold regexes, got {pattern!r}: {error}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)

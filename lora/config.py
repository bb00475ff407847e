"""What an adapter is: its rank, its scaling, and the layers it sits on. Names and defaults a PEFT user knows."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from .init import PLAIN, is_known, takes_from_weight

BIASES = ("none", "all", "lora_only")
ALL_LINEAR = "all-linear"
MAX_R = 1 << 16
MAX_REPEATS, MAX_LENGTH, MAX_NAMES = 7, 20_000, 20_000
"""A regex from a file can be built to run for ever. Seven repeats, none of a group, end within a second a path."""


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
    """all-linear (every linear layer but the output head), a list of names (q_proj), or a regex of the full path.
    embed_tokens and lm_head can be named too."""
    exclude_modules: str | Sequence[str] = ()
    """Left out of the targets: a list of names or a regex."""
    bias: str = "none"
    """Which biases are trained: none, all, or lora_only (of the layers with an adapter). The adapter has copies."""
    use_rslora: bool = False
    """Scale by alpha / √r instead (arXiv 2312.03732): keeps the update's size as r grows."""
    use_dora: bool = False
    """Train the length of each row of the weight apart (lora/dora.py)."""
    init: str = "kaiming"
    """A and B at the start: kaiming or gaussian beside the base's weight, pissa, pissa_niter_4, olora or loftq out of
    it (lora/init.py). On an embedding A is 0 and B N(0, 1)."""
    loftq_iterations: int = 1
    """Of loftq: how often weight and adapter are fitted in turn."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Another r for the layers whose path ends in, or matches, a key."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: Sequence[int] | None = None
    """Only these layer numbers, for target_modules that are not a regex."""
    modules_to_save: Sequence[str] = ()
    """Modules that are trained whole, each in a copy of its own: those whose path ends in one of these."""
    layers_pattern: str | Sequence[str] = ()
    """The name before the layer number (layers), where layers_to_transform would find another number first."""

    def __post_init__(self) -> None:
        self._check_patterns()
        self._check_layers()
        for name, r in [("r", self.r), *self.rank_pattern.items()]:
            _require(type(r) is int and r > 0, f"LoRA rank {name} must be a whole number above 0, got {shown(r)}")
            _require(r <= MAX_R, f"LoRA rank {name} must be at most {MAX_R}, got {shown(r)}")
        for name, alpha in [("alpha", self.alpha), *self.alpha_pattern.items()]:
            _require(_is_number(alpha) and alpha > 0, f"LoRA {name} must be above 0, got {shown(alpha)}")
        is_rate = _is_number(self.dropout) and 0 <= self.dropout < 1
        _require(is_rate, f"LoRA dropout must lie in [0, 1), got {shown(self.dropout)}")
        known = isinstance(self.init, str) and is_known(self.init)
        starts = f"{', '.join(PLAIN)}, pissa, pissa_niter_4 (or another number), olora, loftq"
        _require(known, f"LoRA init must be one of {starts}, got {shown(self.init)}")
        once = type(self.loftq_iterations) is int and self.loftq_iterations >= 1
        _require(once, f"LoRA loftq_iterations must be at least 1, got {shown(self.loftq_iterations)}")
        apart = not (self.use_dora and takes_from_weight(self.init))
        _require(apart, f"use_dora measures the base's weight, which init {self.init} changes: take one of them")
        _require(self.bias in BIASES, f"LoRA bias must be one of {', '.join(BIASES)}, got {shown(self.bias)}")

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            _require(isinstance(pattern, Mapping), f"LoRA {name} must map regexes to values, got {shown(pattern)}")
        lists = ("modules_to_save",)
        for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", *lists):
            patterns = getattr(self, name)
            names = [patterns] if isinstance(patterns, str) and name not in lists else patterns
            is_names = isinstance(names, Collection) and all(isinstance(p, str) for p in names)
            kinds = "a list of names" if name in lists else "a regex or a list of names"
            _require(is_names and not isinstance(names, str), f"LoRA {name} must be {kinds}, got {shown(patterns)}")
            _require(len(names) <= MAX_NAMES, f"LoRA {name} must hold at most {MAX_NAMES} names")
            if isinstance(patterns, str | Mapping) or name in ("layers_pattern", *lists):
                for regex in names:
                    _check_regex(name, regex)
        _require("" not in self.modules_to_save, "LoRA modules_to_save must hold names, got an empty one")

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            _require(not self.layers_pattern, "LoRA layers_pattern needs layers_to_transform: it says which numbers")
            return
        is_list = (
            isinstance(layers, Sequence)
            and not isinstance(layers, str)
            and all(type(number) is int for number in layers)
        )
        _require(is_list, f"LoRA layers_to_transform must be a list of layer numbers, got {shown(layers)}")
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
        """Whether the layer at `path` gets a low-rank adapter. What `all-linear` leaves out is not asked about."""
        if self.exclude_modules and matches(self.exclude_modules, path):
            return False
        if any(_within(name).match(path) for name in self.modules_to_save):
            return False
        if not isinstance(self.target_modules, str) and path in self.target_modules:
            return True  # named in full: layers_to_transform does not apply
        wanted = self.target_modules == ALL_LINEAR or matches(self.target_modules, path)
        return wanted and (not self.layers_to_transform or self._layer_number(path) in self.layers_to_transform)

    def saves(self, path: str) -> bool:
        """Whether the module at `path` is trained whole. PEFT's rule: the path ends in a name, within a word too."""
        return any(path.endswith(name) for name in self.modules_to_save)

    def _layer_number(self, path: str) -> int | None:
        """3 in `model.layers.3.mlp.up_proj`. PEFT's rule: the first whole number with two names before it."""
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        if not patterns:
            found = re.search(r"\.[^.]*\.(?P<number>\d+)\.", path)
        else:
            found = next(filter(None, (_numbered(pattern).match(path) for pattern in patterns)), None)
        number = found and found.group("number")
        return int(number) if number else None


def doubled(config: LoRAConfig) -> LoRAConfig:
    """The config of twice the rank and the same scaling, for an adapter whose start is written with it."""
    by = math.sqrt(2) if config.use_rslora else 2
    ranks = {key: 2 * r for key, r in config.rank_pattern.items()}
    alphas = {key: by * alpha for key, alpha in config.alpha_pattern.items()}
    return replace(
        config, r=2 * config.r, alpha=by * config.alpha, rank_pattern=ranks, alpha_pattern=alphas, init="kaiming"
    )


def matches(pattern: str | Sequence[str], path: str) -> bool:
    """PEFT's rule: a string is a regex for the whole path; a list holds paths or their last parts."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(path == name or path.endswith("." + name) for name in pattern)


def _by_pattern(patterns: Mapping[str, object], path: str, default):  # type: ignore[no-untyped-def]  # int or float
    """PEFT's rule for rank_pattern: the first key that, as a regex, matches the end of the path."""
    return next((value for key, value in patterns.items() if _ending(key).match(path)), default)


@lru_cache(maxsize=1 << 16)
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


@lru_cache
def _within(pattern: str) -> re.Pattern[str]:
    """The module of that name, or one inside it."""
    return re.compile(rf"(^|.*\.){pattern}($|\..*)")


@lru_cache
def _numbered(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\.")


def _check_regex(name: str, pattern: str) -> None:
    _require(len(pattern) <= MAX_LENGTH, f"LoRA {name} must hold regexes of at most {MAX_LENGTH} characters")
    try:
        re.compile(pattern)
        if name not in ("target_modules", "exclude_modules"):
            re.compile(rf"x({pattern})(?P<number>y)")  # it will stand inside another
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"LoRA {name} must hold regexes, got {shown(pattern)}: {error}") from None
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)  # without escapes
    repeats = re.findall(r"(?:[*+?]|\{\d*,?\d*\})[?+]?", plain.replace("(?", "("))
    verbose = r"\(\?[a-zL]*x"  # may have spaces before the star
    _require(
        len(repeats) <= MAX_REPEATS and not re.search(rf"\)[*+{{]|{verbose}", plain),
        f"LoRA {name} must hold regexes with at most {MAX_REPEATS} repeats and no repeated group, got {shown(pattern)}",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e38 < value < 1e38


def shown(value: object) -> str:
    """repr, cut: what was found may be a megabyte."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)

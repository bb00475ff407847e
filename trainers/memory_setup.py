"""What a memory plan is of: the flags of a trainer that bytes depend on."""

from dataclasses import dataclass

from models import DecoderConfig

from .memory_exact import ALL_LINEAR
from .optimizers import OPTIMIZERS
from .recipes import METHODS

TRAINERS = ("sft", "dpo", "orpo", "distill", "grpo")
DTYPES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Names and meanings are those of the trainers' flags."""

    method: str = "qlora"
    trainer: str = "sft"
    batch_size: int = 4
    """rows in one forward; pairs for dpo and orpo"""
    sequence_length: int = 1024
    """tokens of every row; for grpo prompt and completion together"""
    accumulation: int = 4
    gradient_checkpointing: bool = False
    dtype: str = "fp32"
    optimizer: str = "paged_adamw"
    optimizer_budget: int | None = None
    r: int = 16
    targets: tuple[str, ...] = ALL_LINEAR
    blocksize: int = 64
    double_quant: bool = True
    num_generations: int = 8
    max_completion_length: int = 256
    teacher: DecoderConfig | None = None
    """distill; held dense in dtype. None: its predictions come from --teacher-cache"""
    beta: float = 0.04
    """grpo: above 0 it compares with the model before training"""
    precompute_ref: bool = False
    """dpo"""
    on_gpu: bool = False
    """kernels there make a 4-bit weight dense, one at a time, for a large product"""

    @property
    def itemsize(self) -> int:
        """Bytes of an activation, and of a frozen dense weight."""
        return DTYPES[self.dtype]

    @property
    def held_dtype(self) -> str:
        return "fp32" if self.method == "full" else self.dtype

    @property
    def rows(self) -> int:
        """Rows in one forward."""
        return self.batch_size * (2 if self.trainer in ("dpo", "orpo") else 1)

    @property
    def tokens(self) -> int:
        """Positions in one forward that trains; a group of completions shares its prompt (shared_prompt.py)."""
        if self.trainer != "grpo":
            return self.rows * self.sequence_length
        prompt, groups = self.sequence_length - self.max_completion_length, -(-self.batch_size // self.num_generations)
        return groups * prompt + self.batch_size * (self.max_completion_length - 1)

    @property
    def predictions(self) -> int:
        """Tokens that reach the output layer, at most."""
        if self.trainer == "grpo":
            return self.batch_size * self.max_completion_length
        return self.rows * (self.sequence_length - 1)

    @property
    def live_reference(self) -> bool:
        """Whether a model as it was before training takes part in every step."""
        return (self.trainer == "dpo" and not self.precompute_ref) or (self.trainer == "grpo" and self.beta > 0)

    @property
    def what_is_kept(self) -> str:
        """The activations in words."""
        kept = "one for each layer, and those of one layer" if self.gradient_checkpointing else "of every layer"
        return f"{self.tokens:,} tokens, {self.dtype}, {kept}"

    def check(self, config: DecoderConfig) -> None:
        """Raises ValueError, naming the flag, for what no trainer takes."""
        for name, value, known in (
            ("method", self.method, METHODS),
            ("trainer", self.trainer, TRAINERS),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in known:
                raise ValueError(f"--{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("batch_size", "sequence_length", "accumulation", "r", "blocksize", "num_generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.sequence_length > config.max_position_embeddings:
            raise ValueError(
                f"--sequence-length {self.sequence_length:,} is beyond the model's context of "
                f"{config.max_position_embeddings:,}"
            )
        if self.trainer == "grpo" and not 1 <= self.max_completion_length < self.sequence_length:
            raise ValueError(
                "--sequence-length is of prompt and completion: it must be above --max-completion-length "
                f"{self.max_completion_length}, got {self.sequence_length}"
            )

"""The flags of `qlora distill`, beside those of `qlora sft`: its data and model flags mean the same here."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kernels.divergence import check_mix

from .flags import require, require_one_of
from .sft_config import SFTConfig

TEACHER_QUANTIZE = ("none", "nf4", "fp4")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(SFTConfig):
    """Distillation: a student (--model) learns what its teacher (--teacher) predicts, token by token."""

    TRAINER: ClassVar[str] = "distill"

    teacher: str
    """Teacher: built-in name, Hugging Face folder, .gguf file, or hub id. Its vocabulary must be the student's."""
    teacher_adapter: str | None = None
    """Adapter folder that the teacher wears."""
    teacher_quantize: Literal["none", "nf4", "fp4"] = "none"
    """Hold the teacher's linear layers in 4 bits."""
    teacher_cache: str | None = None
    """Folder for the teacher's likeliest tokens: written first where it is not complete; then no teacher is loaded."""
    teacher_top_k: int = 64
    """Tokens kept of each prediction in --teacher-cache; the rest counts as one outcome."""

    beta: float = 0.0
    """Divergence: 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher), between them generalised Jensen-Shannon."""
    temperature: float = 1.0
    """Both models' logits are divided by it in the divergence; above 1 unlikely tokens count more."""
    ce_weight: float = 0.0
    """Share of the dataset's own cross-entropy in the loss, against the divergence; 1 is supervised fine-tuning."""

    on_policy_fraction: float = 0.0
    """Share of the rows whose answer the student samples itself, to be judged by the teacher (GKD)."""
    max_new_tokens: int = 128
    """Longest answer that the student samples."""
    sampling_temperature: float = 1.0
    """Temperature at which the student samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mix(self.beta, self.temperature)
        require(0 <= self.ce_weight <= 1, f"--ce-weight must lie in [0, 1], got {self.ce_weight}")
        fraction = self.on_policy_fraction
        require(0 <= fraction <= 1, f"--on-policy-fraction must lie in [0, 1], got {fraction}")
        require(self.teacher_top_k >= 1, f"--teacher-top-k must be at least 1, got {self.teacher_top_k}")
        require(self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        require(
            0 < self.sampling_temperature < float("inf"),
            f"--sampling-temperature must be positive, got {self.sampling_temperature}",
        )
        require_one_of("teacher_quantize", self.teacher_quantize, TEACHER_QUANTIZE)
        if fraction:
            reason = "cannot judge answers that the student samples while it trains: leave --on-policy-fraction at 0"
            require(self.teacher_cache is None, f"--teacher-cache {reason}")
            require(not self.packing, "--packing takes rows of known length, --on-policy-fraction makes new ones")
            require(self.learn != "everything", "--on-policy-fraction needs a prompt: --learn everything leaves none")

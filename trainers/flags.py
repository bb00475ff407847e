"""The flags of every trainer, and the rules that they must keep: model, adapter, optimizer, schedule, run folder."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lora import LoRAConfig
from optim import SCHEDULES, learning_rate

from .optimizers import OPTIMIZERS
from .recipes import METHODS, default_learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainerFlags:
    """What a trainer trains, how, and where it keeps its run."""

    TRAINER: ClassVar[str] = "sft"
    """The command that takes these flags; it chooses the default of the learning rate."""

    out: str
    """The run's folder, for example runs/first. It must not hold a run, unless --resume."""
    model: str = "smollm2-135m"
    """Base model: built-in name, Hugging Face folder, .gguf file, or hub id."""
    method: Literal["full", "lora", "qlora"] = "qlora"
    """What is trained: all weights, adapters on a dense base, or adapters on a 4-bit base."""
    chat_template: str | None = None
    """Chat format: chatml, llama-3, vicuna, chatgpt, alpaca, plain or a Jinja file; by default the model's own."""

    r: int = 16
    """LoRA rank."""
    alpha: float = 16.0
    """LoRA α: the update is scaled by alpha / r."""
    dropout: float = 0.0
    """LoRA dropout."""
    target_modules: str = "all-linear"
    """all-linear, names with commas between (q_proj,v_proj), or a regex of the full path."""
    exclude_modules: str = ""
    """Left out of the targets: names with commas between, or a regex."""
    layers_to_transform: list[int] = field(default_factory=list)
    """Only these layer numbers; all of them by default."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of linear layers are trained too: all, or those beside an adapter."""
    modules_to_save: str = ""
    """Trained whole, in the adapter: names with commas between (lm_head, embed_tokens, norm)."""
    use_rslora: bool = False
    """Scale by alpha / √r."""
    use_dora: bool = False
    """DoRA: train the length of each row of a weight apart from its direction."""
    init: str = "kaiming"
    """Start of A and B: kaiming, gaussian; or out of the weights: pissa, pissa_niter_4, olora, loftq (qlora)."""
    loftq_iterations: int = 1
    """How often loftq fits weight and adapter in turn."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book (qlora)."""
    blocksize: int = 64
    """Weights that share one scale (qlora)."""
    double_quant: bool = True
    """Quantize the scales too (qlora)."""

    max_steps: int | None = None
    """Optimizer steps; by default what --epochs makes."""
    epochs: float = 1.0
    """Passes over the training rows."""
    batch_size: int = 4
    """Rows in one forward, on each process."""
    accumulation: int = 4
    """Forwards in one update: batch_size · accumulation rows on each process."""
    learning_rate: float | None = None
    """Peak rate; by default one that suits trainer and method (trainers/recipes.py)."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After warm-up: stay, or fall to zero."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm; 0 turns it off. The norm is logged as it was before clipping."""
    max_skipped: int = 3
    """Updates in a row that may be left out since the loss or the gradient was not finite; one more stops the run."""
    optimizer: Literal["adamw", "paged_adamw", "paged_adamw_8bit"] = "paged_adamw"
    """torch's AdamW, or the same with its state in pages, in 32 or 8 bits."""
    optimizer_budget: int | Literal["auto"] | None = None
    """Bytes of optimizer state in fast memory, or auto: half of what is free. By default all of it."""
    optimizer_spill: str | None = None
    """Where state over the budget goes: cpu (for a GPU), or a folder; by default the run's folder for a CPU."""
    loraplus_ratio: float | None = None
    """LoRA+: B learns at this times the rate of A; the paper suggests about 16."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Frozen weights and activations. What is trained stays fp32."""
    gradient_checkpointing: bool = False
    """Keep one activation a layer and compute the rest again in backward: less memory, a third more time."""
    seed: int = 42
    """Order of the rows, start of A, dropout, sampling."""
    threads: int | None = None
    """CPU threads; by default torch's choice. Bits are the same only for the same number."""

    eval_every: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves none."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    samples: int = 4
    """Held-out rows answered at the end, into samples.jsonl."""
    resume: bool = False
    """Go on from the last checkpoint in --out, to the same bits as if nothing had happened."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"--{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "save_every", "samples", "weight_decay", "max_grad_norm", "max_skipped"):
            require(getattr(self, name) >= 0, f"--{flag(name)} must not be negative, got {getattr(self, name)}")
        require(self.max_steps is None or self.max_steps >= 1, f"--max-steps must be at least 1, got {self.max_steps}")
        require(self.epochs > 0, f"--epochs must be above 0, got {self.epochs}")
        rate = self.learning_rate
        require(rate is None or (math.isfinite(rate) and rate > 0), f"--learning-rate must be above 0, got {rate}")
        require(0 <= self.warmup_ratio < 1, f"--warmup-ratio must lie in [0, 1), got {self.warmup_ratio}")
        ratio, budget = self.loraplus_ratio, self.optimizer_budget
        require(ratio is None or ratio > 0, f"--loraplus-ratio must be above 0, got {ratio}")
        require(ratio is None or self.method != "full", "--loraplus-ratio is for lora and qlora: full has no B")
        require(not isinstance(budget, int) or budget >= 0, f"--optimizer-budget must not be negative, got {budget}")
        in_4bit = self.method == "qlora" or self.init != "loftq"
        require(in_4bit, "--init loftq fits an adapter to the rounding of a 4-bit base: it needs --method qlora")
        require_one_of("optimizer", self.optimizer, OPTIMIZERS)
        require_one_of("method", self.method, METHODS)
        require_one_of("schedule", self.schedule, SCHEDULES)

    @property
    def peak_rate(self) -> float:
        """--learning-rate, or the default of this trainer and method."""
        return (
            self.learning_rate if self.learning_rate is not None else default_learning_rate(self.method, self.TRAINER)
        )

    def warmup_steps(self, total_steps: int) -> int:
        """Steps in which the rate rises."""
        return round(self.warmup_ratio * total_steps)

    def rate(self, step: int, total_steps: int) -> float:
        """The learning rate of step `step` (from 0)."""
        warmup = self.warmup_steps(total_steps)
        return learning_rate(
            step, total_steps=total_steps, peak=self.peak_rate, warmup_steps=warmup, schedule=self.schedule
        )

    def lora(self) -> LoRAConfig:
        """The adapter that these flags describe. Raises ValueError for values that make none."""
        return LoRAConfig(
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=_names_or_regex(self.target_modules),
            exclude_modules=_names_or_regex(self.exclude_modules),
            layers_to_transform=self.layers_to_transform or None,
            bias=self.bias,
            modules_to_save=self.modules_to_save.split(",") if self.modules_to_save else (),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init=self.init,
            loftq_iterations=self.loftq_iterations,
        )


def require(holds: bool, message: str) -> None:
    """Raises ValueError with the message where a rule of the flags does not hold."""
    if not holds:
        raise ValueError(message)


def require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ValueError, naming the flag, for a value that is none of those known (a config.json may hold anything)."""
    require(value in known, f"--{flag(name)} must be one of {', '.join(known)}, got {value!r}")


def flag(name: str) -> str:
    """A field's name as it is typed."""
    return name.replace("_", "-")


def _names_or_regex(text: str) -> str | list[str]:
    names = text.split(",")
    return names if len(names) > 1 or text.isidentifier() else text

"""The flags of `qlora sft`, beside those of every trainer."""

from dataclasses import dataclass

from data.encode import LEARN, Learn
from data.flags import DataFlags

from .flags import TrainerFlags, require, require_one_of


@dataclass(frozen=True, kw_only=True)
class SFTConfig(DataFlags, TrainerFlags):
    """Supervised fine-tuning: full, LoRA or QLoRA."""

    learn: Learn = "answers"
    """What the loss counts: every answer with its end token, the last answer alone, or everything."""
    max_seq_length: int = 1024
    """Longer rows lose their end, and are counted."""
    packing: bool = False
    """Several examples in a row of up to max_seq_length tokens, blind to each other; batch_size counts packed rows."""
    group_by_length: bool = False
    """Rows of like length in one forward: less padding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_seq_length >= 1, f"--max-seq-length must be at least 1, got {self.max_seq_length}")
        require(not (self.packing and self.group_by_length), "--packing leaves nothing for --group-by-length to do")
        require_one_of("learn", self.learn, LEARN)

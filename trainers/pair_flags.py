"""The flags that DPO and ORPO share, beside those of every trainer."""

from dataclasses import dataclass, replace

from data.dataset import Dataset, read_datasets
from data.flags import DataFlags

from .flags import TrainerFlags, require


@dataclass(frozen=True, kw_only=True)
class PairFlags(DataFlags, TrainerFlags):
    """Preference data: which pairs, and how long they may be. --batch-size counts pairs."""

    max_seq_length: int = 1024
    """Longer conversations lose their end, and are counted."""
    max_new_tokens: int = 128
    """Longest answer in samples.jsonl, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_seq_length", "max_new_tokens"):
            require(
                getattr(self, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}"
            )
        wrong = f"--shape must be preference for {self.TRAINER}, got {self.shape!r}"
        require(self.shape in ("auto", "preference"), wrong)

    def datasets(self) -> tuple[Dataset, Dataset | None]:
        """The pairs that train and those held out, even of files that could be read as conversations too."""
        return read_datasets(replace(self, shape="preference"))

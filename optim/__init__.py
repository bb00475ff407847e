"""optim: what moves the parameters: AdamW with its state in pages, learning-rate schedules, parameter groups."""

from quant.imports import check_kernels_import

check_kernels_import()

from .groups import decay_groups, loraplus_groups, set_learning_rate  # noqa: E402  # after the check
from .paged_adamw import PagedAdamW  # noqa: E402
from .pages import PageStats, PageTable  # noqa: E402
from .schedules import SCHEDULES, learning_rate  # noqa: E402
from .transport import FolderTransport, HostTransport, SlowTransport, SpillError, Transport  # noqa: E402

__all__ = [
    "SCHEDULES",
    "FolderTransport",
    "HostTransport",
    "PageStats",
    "PageTable",
    "PagedAdamW",
    "SlowTransport",
    "SpillError",
    "Transport",
    "decay_groups",
    "learning_rate",
    "loraplus_groups",
    "set_learning_rate",
]

"""The optimizer that a trainer's flags describe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from optim import PagedAdamW, decay_groups, loraplus_groups
from optim.paged_adamw import PAGE_BYTES

OPTIMIZERS = ("adamw", "paged_adamw", "paged_adamw_8bit")


class OptimizerFlags(Protocol):
    """The fields of a config that choose the optimizer."""

    @property
    def out(self) -> str: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def optimizer_budget(self) -> int | Literal["auto"] | None: ...
    @property
    def optimizer_spill(self) -> str | None: ...
    @property
    def loraplus_ratio(self) -> float | None: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def peak_rate(self) -> float: ...


def make_optimizer(flags: OptimizerFlags, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """adamw is torch's. Raises ValueError where LoRA+ is asked for and nothing is called lora_B."""
    ratio, decay = flags.loraplus_ratio, flags.weight_decay
    groups = decay_groups(parameters, decay) if ratio is None else loraplus_groups(parameters, decay, ratio)
    if flags.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=flags.peak_rate)
    on_cpu = parameters[0][1].device.type == "cpu"
    return PagedAdamW(
        groups,
        lr=flags.peak_rate,
        state_bits=8 if flags.optimizer == "paged_adamw_8bit" else 32,
        page_bytes=PAGE_BYTES,
        device_budget=flags.optimizer_budget,
        spill=flags.optimizer_spill or (Path(flags.out) / "spill" if on_cpu else "cpu"),
    )


def paging(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """For metrics.jsonl: what paging has done so far; empty for an optimizer without pages."""
    return {"paging": optimizer.stats} if isinstance(optimizer, PagedAdamW) else {}

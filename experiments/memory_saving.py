"""What each form of saving memory saves, planned and measured. docs/experiments/memory_saving.md reads the result.

    python -m experiments.memory_saving      (qlora experiment memory_saving)

Each line adds one saving to the line above. The plan is trainers/memory.py's, of Llama-3.1-8B and of a small decoder;
on the small one, of random weights, an update is run too, and the peak of live tensor bytes counted. What the planner
does not plan, since no trainer here does it, is a loss over all logits at once:

    whole logits    3 · 4 · M·V bytes in its backward: log-softmax, its gradient, and that of the logits

    M predicted tokens, V vocabulary
"""

import argparse
import tempfile
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bench_train_step import LiveBytes
from lora import LoRAConfig, add_adapter, trainable_parameters
from lora.attach import quantize_model
from models import Decoder, DecoderConfig
from models.well_known import WELL_KNOWN
from optim import PagedAdamW
from trainers.logprobs import per_token_nll
from trainers.loop import train_step
from trainers.memory import Part, Plan, Setup, plan

from .pages import Rows, publish

SMALL = DecoderConfig(8192, 320, 864, 8, 5, 5, 64, 2048)
LARGE = "llama-3.1-8b"
GROUPS = {
    "weights": ("linear weights", "4-bit weights", "embeddings and head", "norms and biases"),
    "scales": ("scales of the 4-bit weights",),
    "adapters": ("adapters",),
    "gradients": ("gradients",),
    "optimizer state": ("optimizer state",),
    "activations": ("activations",),
    "logits, workspace": ("logits", "workspace"),
}


LORA = {"method": "lora", "optimizer": "paged_adamw", "optimizer_budget": None}


class Saving(NamedTuple):
    name: str
    changes: dict[str, Any]
    """to the setup of the line above"""
    whole_logits: bool = False


SAVINGS = (
    Saving("full fine-tuning", {"method": "full", "optimizer": "adamw"}, whole_logits=True),
    Saving("+ AdamW in 8 bits", {"optimizer": "paged_adamw_8bit"}, whole_logits=True),
    Saving("+ its pages spilled but a tenth", {"optimizer_budget": 0}, whole_logits=True),
    Saving("LoRA instead, AdamW in fp32", LORA, whole_logits=True),
    Saving("+ weights in 4 bits", {"method": "qlora", "double_quant": False}, whole_logits=True),
    Saving("+ double quantization", {"double_quant": True}, whole_logits=True),
    Saving("+ cross-entropy in chunks", {}),
    Saving("+ checkpointing", {"gradient_checkpointing": True}),
    Saving("+ AdamW in 8 bits again", {"optimizer": "paged_adamw_8bit"}),
)


def ladder(start: Setup, config: DecoderConfig) -> list[tuple[Saving, Setup]]:
    """Each saving with the setup that it makes. A budget is a tenth of what the state would take."""
    setups, setup = [], start
    for saving in SAVINGS:
        changes = dict(saving.changes)
        if changes.get("optimizer_budget") == 0:
            state = next(part for part in plan(config, setup).always if part.name == "optimizer state")
            changes["optimizer_budget"] = state.nbytes // 10
        setup = replace(setup, **changes)
        setups.append((saving, setup))
    return setups


def planned(config: DecoderConfig, setup: Setup, whole_logits: bool) -> dict[str, int]:
    """Bytes of each group at the peak of a step."""
    made = plan(config, setup)
    parts = made.parts
    if whole_logits:
        parts = max(parts, _at_whole_logits(config, made), key=lambda parts: sum(part.nbytes for part in parts))
    return {group: sum(part.nbytes for part in parts if part.name in names) for group, names in GROUPS.items()}


def _at_whole_logits(config: DecoderConfig, made: Plan) -> tuple[Part, ...]:
    """What is held in the backward of a loss over all logits."""
    M, V = made.setup.predictions, config.vocab_size
    head = next(phase for phase in made.phases if phase.name == "backward of the output layer")
    kept = [part for part in head.parts if part.name != "logits"]
    return (*made.always, *kept, Part("logits", 12 * M * V, False, ""))


def measured(config: DecoderConfig, setup: Setup, whole_logits: bool, folder: str) -> int:
    """Peak of live tensor bytes in the second update, over random tokens; what is paged out goes to the folder."""
    torch.manual_seed(0)
    model = Decoder(config)
    if setup.method == "qlora":
        quantize_model(model, blocksize=setup.blocksize, double_quant=setup.double_quant)
    if setup.method != "full":
        add_adapter(model, LoRAConfig(r=setup.r, alpha=setup.r))
    model.train().gradient_checkpointing = setup.gradient_checkpointing
    parameters = trainable_parameters(model)
    optimizer = _optimizer([parameter for _, parameter in parameters], setup, folder)
    batch = torch.randint(0, config.vocab_size, (setup.batch_size, setup.sequence_length))

    def loss_of(batch: Tensor) -> Tensor:
        if whole_logits:
            return functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        ones = torch.ones_like(batch)
        return per_token_nll(model, batch, ones, ones).mean()

    def update() -> None:
        train_step([batch], loss_of, parameters, optimizer, learning_rate=1e-4, max_grad_norm=1.0)

    update()
    optimizer.zero_grad(set_to_none=True)
    with LiveBytes([*model.parameters(), *model.buffers(), *_fast_state(optimizer)]) as live:
        update()
    return live.peak


def _optimizer(parameters: list[torch.nn.Parameter], setup: Setup, folder: str) -> torch.optim.Optimizer:
    if setup.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-4)
    bits = 8 if setup.optimizer == "paged_adamw_8bit" else 32
    return PagedAdamW(parameters, lr=1e-4, state_bits=bits, device_budget=setup.optimizer_budget, spill=folder)


def _fast_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's tensors outside its slow tier."""
    if isinstance(optimizer, PagedAdamW):
        assert optimizer.table is not None
        return [*optimizer.table.resident.values(), *optimizer.table.free]
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def run(quick: bool) -> list[dict[str, Any]]:
    """A row for each model and saving."""
    small = replace(SMALL, num_hidden_layers=1, vocab_size=512) if quick else SMALL
    length = 16 if quick else 256
    setups = {
        "small": (small, Setup(batch_size=4, sequence_length=length, accumulation=1)),
        LARGE: (WELL_KNOWN[LARGE], Setup(batch_size=4, sequence_length=2048, accumulation=1, dtype="bf16")),
    }
    rows = []
    for name, (config, start) in setups.items():
        for saving, setup in ladder(start, config):
            parts = planned(config, setup, saving.whole_logits)
            with tempfile.TemporaryDirectory() as folder:
                peak = measured(config, setup, saving.whole_logits, folder) if name == "small" else ""
            planned_total = sum(parts.values())
            rows.append({"model": name, "saving": saving.name} | parts | {"planned": planned_total, "measured": peak})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    quick = parser.parse_args(argv).quick
    publish("memory_saving", run(quick), key="model", tables=tables, draw=draw, panels=(1, 2), quick=quick)


def tables(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """For each model: MB or GB of every group, and what the line saves of the one above."""
    made: dict[str, list[dict[str, Any]]] = {}
    for title, model, unit, digits in (("small", "small", 1e6, 1), ("large", LARGE, 1e9, 2)):
        lines: list[dict[str, Any]] = []
        before = None
        for row in rows:
            if row["model"] != model:
                continue
            total = int(row["measured"] or row["planned"])
            line: dict[str, Any] = {"MB" if unit == 1e6 else "GB": row["saving"]}
            line |= {group: f"{int(row[group]) / unit:.{digits}f}" for group in GROUPS}
            line["planned"] = f"{int(row['planned']) / unit:.{digits}f}"
            if row["measured"]:
                line["measured"] = f"{total / unit:.{digits}f}"
                line["planned / measured"] = f"{int(row['planned']) / total:.3f}"
            line["saved"] = "" if before is None else f"{1 - total / before:.0%}"
            lines.append(line)
            before = total
        made[title] = lines
    return made


def draw(axes: list[Any], rows: Rows) -> None:
    """Stacked bars of the plan; on the small model a dot for what was measured."""
    for ax, model in zip(axes, ("small", LARGE), strict=True):
        of = [row for row in rows if row["model"] == model]
        unit, name = (1e6, "MB") if model == "small" else (1e9, "GB")
        at, left = range(len(of)), [0.0] * len(of)
        for group in GROUPS:
            widths = [int(row[group]) / unit for row in of]
            ax.barh(at, widths, left=left, label=group)
            left = [x + width for x, width in zip(left, widths, strict=True)]
        peaks = [(i, int(row["measured"]) / unit) for i, row in enumerate(of) if row["measured"]]
        if peaks:
            ax.plot([peak for _, peak in peaks], [i for i, _ in peaks], "kD", markersize=4, label="measured")
        ax.set(title=model, xlabel=name, yticks=at, yticklabels=[row["saving"] for row in of])
        ax.invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    axes[1].legend(handles, labels, fontsize="small", loc="lower right")


if __name__ == "__main__":
    main()

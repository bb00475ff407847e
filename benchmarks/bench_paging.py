"""What paging costs: one optimizer step for budgets from all of the state resident to none of it.

    qlora bench paging -- --elements 16000000 --state-bits 32 --tier folder

Arms: PagedAdamW with each budget; torch.optim.AdamW (foreach, fused) and bitsandbytes' AdamW8bit, where they run. They
take turns. Beside the measured time stands the model's,

    model = max(compute, bytes moved / bandwidth)

with compute the time of a step with all resident, the bytes of one step from the exact counters, and the bandwidth of
an arm that takes every page out and brings it back, one transfer after the other through one frame, with no work on it.

A file in the system's cache is memory, and to move pages is work for a processor. So there is another arm in which all
threads move pages at once, none left to compute, and beside the model stands

    apart = compute + bytes moved / bandwidth by all threads

the two done one after the other, each by all threads.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import spread, take_turns, versions
from benchmarks.results import RESULTS, write_rows
from kernels.adamw_pages import adamw_pages
from optim import FolderTransport, PagedAdamW, PageTable, SlowTransport, Transport
from optim.paged_adamw import PAGE_BYTES
from optim.pages import AHEAD

CPU = torch.device("cpu")
BASE = "torch fused"
TRANSPORT = "all pages out and in, no work"
BY_ALL = f"{TRANSPORT}, by all threads"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--elements", type=int, default=16_000_000)
    flags.add_argument("--state-bits", type=int, default=32, choices=(32, 8))
    flags.add_argument("--shares", default="1,0.75,0.5,0.25,0.1,0", help="budgets, as shares of the state")
    flags.add_argument("--tier", default="folder", choices=("folder", "slow"), help="slow: a pretended device")
    flags.add_argument("--folder", default=tempfile.gettempdir(), help="where the folder tier lies")
    flags.add_argument("--bandwidth", type=float, default=2e9, help="of the slow tier, bytes a second")
    flags.add_argument("--latency", type=float, default=1e-4, help="of the slow tier, seconds a transfer")
    flags.add_argument("--page-bytes", type=int, default=PAGE_BYTES)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--no-prefetch", action="store_true")
    flags.add_argument("--no-peer", action="store_true", help="leave torch and bitsandbytes out")
    args = flags.parse_args()

    gradient = torch.randn(args.elements) * 1e-2
    ours = {share: paged(args, share) for share in map(float, args.shares.split(","))}
    arms: dict[str, Callable[[], Any]] = {} if args.no_peer else peers(args.elements, gradient)
    arms |= {arm_name(share): stepping(optimizer, gradient) for share, optimizer in ours.items()}
    table = no_work(args, ahead=0)
    arms[TRANSPORT] = lambda: [page for page, _ in table.walk(range(len(table.used)))]
    if args.tier == "folder":
        arms[BY_ALL] = by_all_threads(no_work(args, ahead=AHEAD))
    times = take_turns(arms, args.rounds, pause=0.02)
    gate(ours)
    moved = 1e3 * 2 * sum(table.used)
    bandwidth = {arm: moved / statistics.median(times[arm]) for arm in (TRANSPORT, BY_ALL) if arm in times}
    compute = statistics.median(times[arm_name(max(ours))])
    rows = [row(args, arm, taken, times, bandwidth, compute, ours) for arm, taken in times.items()]
    write_rows("paging", rows, key="key")
    plot([r for r in rows if r["share"] != ""], RESULTS / "paging.png")


def arm_name(share: float) -> str:
    return f"paged {share:.0%} resident"


def paged(args: argparse.Namespace, share: float) -> PagedAdamW:
    """An optimizer of its own parameter, all of them alike."""
    p = nn.Parameter(torch.zeros(args.elements))
    budget = None if share >= 1 else int(share * state_bytes(args))
    optimizer = PagedAdamW(
        [p], state_bits=args.state_bits, device_budget=budget, page_bytes=args.page_bytes, transport=transport(args),
        prefetch=not args.no_prefetch,
    )  # fmt: skip
    return optimizer


def transport(args: argparse.Namespace) -> Transport:
    if args.tier == "folder":
        return FolderTransport(args.folder, CPU)
    return SlowTransport(bytes_per_second=args.bandwidth, latency=args.latency)


def peers(elements: int, gradient: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """torch's AdamW as it runs here, and bitsandbytes' 8-bit one."""
    import bitsandbytes

    made = {
        BASE: lambda p: torch.optim.AdamW(p, fused=True),
        "torch foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "bitsandbytes AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p),
    }
    return {name: stepping(make([nn.Parameter(torch.zeros(elements))]), gradient) for name, make in made.items()}


def stepping(optimizer: torch.optim.Optimizer, gradient: torch.Tensor) -> Callable[[], Any]:
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = gradient
    return optimizer.step


def gate(ours: dict[float, PagedAdamW]) -> None:
    """Raises ValueError unless every budget gave the same bits."""
    first, *others = (optimizer.parameters[0] for optimizer in ours.values())
    for share, other in zip(list(ours)[1:], others, strict=True):
        if not torch.equal(first, other):
            raise ValueError(f"with {share:.0%} resident the parameters differ from those with another budget")


def state_bytes(args: argparse.Namespace) -> int:
    return int(args.elements * (8 if args.state_bits == 32 else 2 + 8 / 256))


def no_work(args: argparse.Namespace, ahead: int) -> PageTable:
    """A table of as many pages as the state has, as few of them resident as can be, all written once."""
    sizes = [min(args.page_bytes, state_bytes(args) - at) for at in range(0, state_bytes(args), args.page_bytes)]
    table = PageTable(sizes, args.page_bytes, transport(args), budget=0, ahead=ahead)
    for _ in range(2):  # the first walks write to a file that has no bytes yet
        for _ in table.walk(range(len(sizes))):
            pass
    return table


def by_all_threads(table: PageTable) -> Callable[[], Any]:
    """A step on pages without a parameter in them: brought and taken away, no more."""
    folder = table.transport
    assert isinstance(folder, FolderTransport)

    def move() -> None:
        visits = table.visits(range(len(table.used)))
        adamw_pages(visits, [()] * len(visits), folder.descriptor(), table.free[: torch.get_num_threads()])
        table.visited(visits)

    return move


def counters_of_a_step(optimizer: PagedAdamW) -> dict[str, Any]:
    """What the counters grow by in one step, as in every one after the first."""
    before = optimizer.stats
    optimizer.step()
    return {name: value - before[name] for name, value in optimizer.stats.items()}


def row(
    args: argparse.Namespace,
    arm: str,
    taken: list[float],
    times: dict[str, list[float]],
    bandwidth: dict[str, float],
    compute: float,
    ours: dict[float, PagedAdamW],
) -> dict[str, Any]:
    """A CSV row; bytes, hits and misses are one step's."""
    case = {
        "elements": args.elements,
        "state_bits": args.state_bits,
        "tier": args.tier,
        "prefetch": not args.no_prefetch,
    }
    measured: dict[str, Any] = dict.fromkeys(
        ("share", "resident_bytes", "bytes_moved", "hits", "misses", "model_ms", "apart_ms"), ""
    )
    share = next((share for share in ours if arm == arm_name(share)), None)
    if share is not None:
        step = counters_of_a_step(ours[share])
        moved = step["bytes_in"] + step["bytes_out"]
        model = max(compute, 1e3 * moved / bandwidth[TRANSPORT])
        measured = {"share": share, "resident_bytes": ours[share].stats["resident_bytes"], "bytes_moved": moved}
        measured |= {"hits": step["hits"], "misses": step["misses"], "apart_ms": ""}
        measured["model_ms"] = f"{model:.1f}"
        if BY_ALL in bandwidth:
            measured["apart_ms"] = f"{compute + 1e3 * moved / bandwidth[BY_ALL]:.1f}"
    base = BASE if BASE in times else next(iter(times))
    return (
        {"key": "/".join([*map(str, case.values()), arm]), "arm": arm}
        | case
        | measured
        | spread(taken, times[base], base, digits=1)
        | {"bandwidth": round(bandwidth[TRANSPORT]), "peer_versions": versions("bitsandbytes")}
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Step time over the share that is resident, measured and by the model. Where matplotlib is not, nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    shares = [100 * row["share"] for row in rows]
    axes.plot(shares, [float(row["p50_ms"]) for row in rows], marker="o", label="measured")
    model = "model: max(compute, bytes / bandwidth)"
    axes.plot(shares, [float(row["model_ms"]) for row in rows], linestyle="--", label=model)
    if all(row["apart_ms"] for row in rows):
        apart = "apart: compute + bytes / bandwidth by all threads"
        axes.plot(shares, [float(row["apart_ms"]) for row in rows], linestyle=":", label=apart)
    axes.set(xlabel="% of the state resident", ylabel="ms a step", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

"""A QLoRA training step of SmolLM2-135M on rows padded, grouped by length, and packed: learnt tokens a second.

    padded      `--batch-size` rows, shuffled, padded to the longest
    grouped     as many of like length
    packed      one row of at most as many tokens as such a batch may hold; its examples are blind to each other

One model in one process; the arms take turns for `--rounds` rounds, each time on other rows. A step is forward,
backward and optimizer. Both sides are ours: no peer. The rows are the demo's, of nearly equal length, or (`mixed`)
one to four of them joined.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.results import write_rows
from data import DataOrder, Encoded, collate_packed, detect, encode_dataset, tasks
from models import Decoder, load_tokenizer
from trainers import sft
from trainers.logprobs import per_token_nll
from trainers.loop import Window, count_window


def task_rows(kind: str) -> list[dict[str, str]]:
    rows = tasks.make_split("train", 400)
    if kind == "demo":
        return rows
    groups = [rows[start : start + 1 + start % 4] for start in range(len(rows))]
    return [{key: "\n".join(row[key] for row in group) for key in rows[0]} for group in groups]


def step(model: Decoder, optimizer: torch.optim.Optimizer, rows: list[list[Encoded]], pad_id: int) -> dict[str, Any]:
    """One update over one batch: what was in it, and how long it took."""
    batch = collate_packed(rows, pad_id=pad_id)
    start = time.perf_counter()
    nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
    sft.sft_loss(nll, batch.completion_mask).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"seconds": time.perf_counter() - start, "window": count_window([batch])}


def compare(kind: str, batch_size: int, rounds: int, dtype: str) -> list[dict[str, Any]]:
    """A row for each arm: medians over the rounds, and the ratio of the speed to that of padded rows."""
    config = sft.SFTConfig(data="", out="", dtype=dtype, seed=0)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(config.model)
    rows = task_rows(kind)
    examples = encode_dataset(tokenizer, rows, detect(rows, kind), max_seq_length=2048, path=kind).examples
    lengths = [len(example.ids) for example in examples]
    learnt_share = sum(example.n_learnt for example in examples) / sum(lengths)
    arms = {
        "padded": (DataOrder(lengths, 0), batch_size),
        "grouped": (DataOrder(lengths, 0, group=batch_size), batch_size),
        "packed": (DataOrder(lengths, 0, capacity=batch_size * max(lengths)), 1),
    }
    model = sft.prepare_model(config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn in range(-1, rounds):  # the first round warms up
        for arm, (order, size) in arms.items():
            batch = [[examples[i] for i in row] for row in order.step(size, turn + 1)]
            result = step(model, optimizer, batch, tokenizer.pad_id)
            if turn >= 0:
                found[arm].append(result)
    table = [
        {"rows": kind, "dtype": dtype, "batch_size": batch_size, "arm": arm} | summary(steps, learnt_share)
        for arm, steps in found.items()
    ]
    for row in table:
        row["ratio"] = round(row["learnt_tokens_per_second"] / table[0]["learnt_tokens_per_second"], 2)
    return table


def summary(steps: list[dict[str, Any]], learnt_share: float) -> dict[str, Any]:
    """Text tokens a second, times the share of them that is learnt in the whole data: steps differ in it by chance."""
    windows: list[Window] = [one["window"] for one in steps]
    speeds = sorted(learnt_share * one["window"].tokens / one["seconds"] for one in steps)
    p20, p80 = (speeds[round(q * (len(speeds) - 1))] for q in (0.2, 0.8))
    return {
        "examples_a_step": round(statistics.mean(window.examples for window in windows), 1),
        "padding": round(statistics.mean(window.padding for window in windows), 3),
        "learnt_tokens_per_second": round(statistics.median(speeds), 1),
        "p20": round(p20, 1),
        "p80": round(p80, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=("demo", "mixed"), default="demo")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    write_rows("packing", compare(args.rows, args.batch_size, args.rounds, args.dtype), key="rows")


if __name__ == "__main__":
    main()

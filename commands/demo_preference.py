"""qlora demo dpo, qlora demo orpo: a preference learnt in a few minutes on a CPU, before and after.

1. write pairs: a short answer is preferred to the same answer in a lot of words (data/brief_task.py)
2. let SmolLM2-135M-Instruct in NF4 answer held-out questions: it rambles
3. train a LoRA adapter on the pairs, for DPO with the RPO term, which holds on to what the chosen answers say
4. load the base again with the saved adapter, and ask the same questions

Two things are measured, on other facts (recombined) and on other kinds of question (unseen):

    the pairs      how often the chosen answer has the higher reward: for DPO log π(y|x) - log π_ref(y|x), which is 0
                   for all answers before training; for ORPO the log-probability a token
    the outputs    how many are brief, how many are right, and their words; nothing but the manner should change

runs/demo-dpo/result.json keeps it.
"""

import json
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data import brief_task
from data.preference import encode_pairs, to_pair
from data.schema import detect
from lora import load_adapter
from models import Decoder, Tokenizer, load_model, load_tokenizer
from trainers import dpo, orpo
from trainers.metrics import peak_memory_bytes
from trainers.pairs import answer_logps, pair_batches
from trainers.run import Trained
from trainers.run_folder import write_json

from .answers import answer
from .demo import clear_old_demo

MODEL = "smollm2-135m"
HELD_OUT = {"recombined": "other facts", "unseen": "other kinds of question"}
LONGEST = 40
MEASURED = {
    "brief": f"answers of at most {brief_task.MOST_WORDS} words",
    "right": "answers that are right",
    "words": "words an answer",
    "chosen_likelier_a_token": "chosen likelier, per token",
    "implicit_reward_accuracy": "chosen with the higher reward",
}
"""What is measured → what it is called on the screen."""
READ_NEXT = {
    "dpo": "trainers/dpo.py, from the formula to the loop; docs/equations.md, section 13",
    "orpo": "trainers/orpo.py, from the formula to the loop; docs/equations.md, section 14",
}
Rows = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class DPODemoArgs:
    """Teach SmolLM2-135M by DPO, with the RPO term, to answer in few words, and show it before and after."""

    TRAINER: ClassVar[str] = "dpo"

    out: str = "runs/demo-dpo"
    """The demo's folder; an earlier demo in it is replaced."""
    train_rows: int = 160
    """Pairs to learn from."""
    held_out_rows: int = 30
    """Pairs to measure on, of each kind."""
    steps: int = 16
    """Optimizer steps, of 8 pairs each."""
    learning_rate: float = 3e-4
    """Peak rate."""
    seed: int = 0
    """Of the rows and of the training."""


@dataclass(frozen=True, kw_only=True)
class ORPODemoArgs(DPODemoArgs):
    """Teach SmolLM2-135M by ORPO to answer in few words, and show it before and after."""

    TRAINER: ClassVar[str] = "orpo"

    out: str = "runs/demo-orpo"
    """The demo's folder; an earlier demo in it is replaced."""


@dataclass(frozen=True)
class Trial:
    """What a model says, and what it thinks of the pairs."""

    outputs: list[str]
    scores: list[brief_task.Score]
    sums: Tensor
    """(2, n): log-probability of the chosen and of the rejected answers"""
    means: Tensor
    """(2, n): the same a token"""

    def numbers(self) -> dict[str, float]:
        n = len(self.outputs)
        return {
            "brief": sum(score.brief for score in self.scores) / n,
            "right": sum(score.right for score in self.scores) / n,
            "words": sum(len(output.split()) for output in self.outputs) / n,
            "chosen_likelier_a_token": in_order(self.means),
        }


def run(args: DPODemoArgs) -> None:
    start = time.perf_counter()
    out = Path(args.out)
    clear_old_demo(out)
    held_out = write_task(out / "data", args)
    print(f"task: {args.train_rows} pairs in {out / 'data' / 'train.jsonl'}, of the shape")
    print(f"  {json.dumps(held_out['recombined'][0], ensure_ascii=False)}")
    tokenizer = load_tokenizer(MODEL)
    print("before: SmolLM2-135M-Instruct in NF4")
    before = try_splits(in_4bit(), tokenizer, held_out)
    trained = train(args, out)
    print("after: the same base, loaded again, with the adapter from its folder")
    reloaded = in_4bit()
    load_adapter(reloaded, out / "run" / "adapter")
    after = try_splits(reloaded, tokenizer, held_out)

    show_examples(held_out, before, after)
    result = {split: compared(args.TRAINER, before[split], after[split]) for split in HELD_OUT}
    show_numbers(result, args.held_out_rows)
    measured = {
        "held_out_rows": args.held_out_rows,
        "seconds": round(time.perf_counter() - start, 1),
        "training_seconds": round(trained.result.seconds, 1),
        "tokens_per_second": round(trained.result.tokens_per_second, 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    write_json(out / "result.json", {"before_and_after": result} | measured)
    print(f"{measured['seconds']:.0f} s in all, {peak_memory_bytes() / 1e9:.2f} GB peak; see {out / 'result.json'}")
    question = held_out["unseen"][0]["prompt"]
    print(f"try it: qlora generate --quantize nf4 --adapter {out / 'run' / 'adapter'} {json.dumps(question)}")
    print(f"read next: {READ_NEXT[args.TRAINER]}; docs/metrics.md, for {out / 'run' / 'metrics.jsonl'} and its plots")


def in_4bit() -> Decoder:
    return load_model(MODEL, quantize="nf4").eval()


def train(args: DPODemoArgs, out: Path) -> Trained:
    """The run that `qlora dpo` or `qlora orpo` would make of the same flags."""
    flags: dict[str, Any] = {
        "model": MODEL,
        "data": str(out / "data" / "train.jsonl"),
        "out": str(out / "run"),
        "learning_rate": args.learning_rate,
        "max_steps": args.steps,
        "batch_size": 8,
        "accumulation": 1,
        "seed": args.seed,
        "samples": 0,
    }
    if args.TRAINER == "dpo":
        return dpo.train(dpo.DPOConfig(rpo_alpha=1.0, **flags))
    return orpo.train(orpo.ORPOConfig(**flags))


def write_task(folder: Path, args: DPODemoArgs) -> dict[str, Rows]:
    """Write train.jsonl, and held_out.jsonl with both kinds; returns the held-out rows of each kind."""
    folder.mkdir(parents=True)
    held_out = {split: brief_task.make_split(split, args.held_out_rows, args.seed) for split in HELD_OUT}
    files = {"train": brief_task.make_split("train", args.train_rows, args.seed)}
    files["held_out"] = [row for rows in held_out.values() for row in rows]
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return held_out


@torch.no_grad()
def try_splits(model: Decoder, tokenizer: Tokenizer, splits: Mapping[str, Rows]) -> dict[str, Trial]:
    """Greedy answers to all prompts in one batch, and the log-probabilities of both answers of each pair."""
    rows = [row for members in splits.values() for row in members]
    schema = detect(rows, "rows")
    conversations = [[*pair.prompt, *pair.chosen] for pair in (to_pair(row, schema, "row") for row in rows)]
    outputs, _ = answer(model, tokenizer, conversations, max_new_tokens=LONGEST, batch_size=len(rows))
    scores = brief_task.score(outputs, rows)
    pairs = encode_pairs(tokenizer, rows, schema, max_seq_length=1024, path="rows").pairs
    logps = [answer_logps(model, batch.rows) for batch in pair_batches(pairs, range(len(pairs)), 8, tokenizer.pad_id)]
    sums, means = (torch.cat([part.view(2, -1) for part in parts], dim=1) for parts in
                   ([each.sums for each in logps], [each.means for each in logps]))  # fmt: skip
    trials, start = {}, 0
    for split, members in splits.items():
        part = slice(start, start + len(members))
        trials[split] = Trial(outputs[part], scores[part], sums[:, part], means[:, part])
        start = part.stop
    return trials


def in_order(rewards: Tensor) -> float:
    """Share of the pairs (2, n) whose chosen answer has the higher reward."""
    return float((rewards[0] > rewards[1]).float().mean())


def compared(trainer: str, before: Trial, after: Trial) -> dict[str, list[float | None]]:
    """[before, after] by name. Before training DPO's reward is 0 for every answer, which is no order."""
    old, new = before.numbers(), after.numbers()
    numbers: dict[str, list[float | None]] = {name: [old[name], new[name]] for name in old}
    if trainer == "dpo":
        numbers["implicit_reward_accuracy"] = [None, in_order(after.sums - before.sums)]
    return numbers


def show_examples(held_out: Mapping[str, Rows], before: Mapping[str, Trial], after: Mapping[str, Trial]) -> None:
    table = Table("", "question", "before", "after", "right answer", show_lines=True)
    for split, rows in held_out.items():
        for i, row in enumerate(rows[:3]):
            texts = [textwrap.shorten(trial[split].outputs[i], 90, placeholder=" …") for trial in (before, after)]
            table.add_row(HELD_OUT[split], row["prompt"], *texts, row["answer"])
    Console().print(table, markup=False)


def show_numbers(result: Mapping[str, Mapping[str, list[float | None]]], n: int) -> None:
    """Before and after, a line for each thing measured; result: of `compared`, by split."""
    print(f"{f'of {n} held-out rows each':30}" + "".join(f"{name:>25}" for name in HELD_OUT.values()))
    print(" " * 30 + f"{'before':>15}{'after':>10}" * len(HELD_OUT))
    for name, label in MEASURED.items():
        if name in result["unseen"]:
            pairs = (result[split][name] for split in HELD_OUT)
            print(f"{label:30}" + "".join(f"{shown(name, old):>15}{shown(name, new):>10}" for old, new in pairs))


def shown(name: str, value: float | None) -> str:
    if value is None:
        return "no order yet"
    return f"{value:.1f}" if name == "words" else f"{value:.0%}"

"""qlora demo: the whole of QLoRA in a few minutes on a CPU, before and after.

1. write the task's rows as files that can be opened (runs/demo/data)
2. load SmolLM2-135M-Instruct, quantizing it to NF4 with double quantization while it loads
3. try it on held-out rows
4. fine-tune LoRA adapters on every linear layer, and save them in PEFT's format
5. load the 4-bit base again with the saved adapter, and try that on the same rows

The score is exact match of the whole record, on rows that recombine known words and forms, and on rows whose names,
things, streets, months and sentence forms training never shows. runs/demo/result.json keeps it.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data import tasks
from data.schema import detect, to_messages
from lora import load_adapter
from models import Completion, Decoder, Tokenizer, load_model, load_tokenizer
from trainers import sft
from trainers.metrics import peak_memory_bytes
from trainers.run_folder import write_json

from .answers import answer

HELD_OUT = ("recombined", "unseen")
SPARE_TOKENS = 8


@dataclass(frozen=True)
class DemoArgs:
    """Fine-tune SmolLM2-135M in 4 bits on a small real task, and show it before and after."""

    out: str = "runs/demo"
    """The demo's folder; an earlier demo in it is replaced."""
    train_rows: int = 400
    """Rows to learn from."""
    held_out_rows: int = 50
    """Rows to score on, of each kind."""
    steps: int = 50
    """Optimizer steps."""
    seed: int = 0
    """Of the rows and of the training."""


def run(args: DemoArgs) -> None:
    start = time.perf_counter()
    out = Path(args.out)
    clear_old_demo(out)
    held_out = write_task(out / "data", args)
    print(f"task: {args.train_rows} rows in {out / 'data' / 'train.jsonl'}, of the shape")
    print(f"  {json.dumps(held_out['recombined'][0], ensure_ascii=False)}")

    config = training_config(args, out)
    tokenizer = load_tokenizer(config.model)
    print("before: SmolLM2-135M-Instruct in NF4")
    base = load_model(config.model, quantize="nf4")
    limit = answer_limit(tokenizer, held_out)
    before = try_splits(base, tokenizer, held_out, limit)
    del base

    trained = sft.train(config)
    print("after: the same base, loaded again, with the adapter from its folder")
    reloaded = load_model(config.model, quantize="nf4")
    load_adapter(reloaded, out / "run" / "adapter")
    after = try_splits(reloaded, tokenizer, held_out, limit)
    same = reloads_equal(trained.model, tokenizer, held_out["unseen"], after["unseen"], limit)

    show_examples(held_out, before, after)
    scores = {split: {"before": before[split].share, "after": after[split].share} for split in HELD_OUT}
    for split, score in scores.items():
        print(f"exact match, {split:10}  before {score['before']:4.0%}   after {score['after']:4.0%}")
    print(f"the reloaded adapter gives the same answers as the model in memory: {'yes' if same else 'NO'}")
    result = {
        "scores": scores,
        "held_out_rows": args.held_out_rows,
        "reloaded_equals_trained": same,
        "seconds": round(time.perf_counter() - start, 1),
        "training_seconds": round(trained.result.seconds, 1),
        "tokens_per_second": round(trained.result.tokens_per_second, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "loss": trained.result.loss,
    }
    write_json(out / "result.json", result)
    print(f"{result['seconds']:.0f} s in all, {peak_memory_bytes() / 1e9:.2f} GB peak; scores in {out / 'result.json'}")
    prompt = write_prompt(out / "prompt.txt", held_out["unseen"][0])
    print(f"try it: qlora generate --quantize nf4 --adapter {out / 'run' / 'adapter'} < {prompt}")


def training_config(args: DemoArgs, out: Path) -> sft.SFTConfig:
    """The flags that `qlora sft` would be given for the same run."""
    return sft.SFTConfig(
        data=str(out / "data" / "train.jsonl"),
        out=str(out / "run"),
        method="qlora",
        r=16,
        alpha=16,
        learning_rate=2e-3,
        max_steps=args.steps,
        batch_size=8,
        accumulation=1,
        seed=args.seed,
        samples=0,
    )


def clear_old_demo(out: Path) -> None:
    """Remove an earlier demo's folder. Raises ValueError for a folder that holds anything else."""
    if not out.exists():
        return
    strangers = sorted(p.name for p in out.iterdir() if p.name not in ("data", "run", "result.json", "prompt.txt"))
    if strangers:
        raise ValueError(f"{out} is not an earlier demo's folder: it holds {strangers[0]}; pass another --out")
    shutil.rmtree(out)


def write_task(folder: Path, args: DemoArgs) -> dict[str, list[dict[str, str]]]:
    """Write train.jsonl, recombined.jsonl and unseen.jsonl; returns the held-out rows."""
    folder.mkdir(parents=True)
    splits = {"train": args.train_rows} | dict.fromkeys(HELD_OUT, args.held_out_rows)
    rows = {split: tasks.make_split(split, n, seed=args.seed) for split, n in splits.items()}
    for split, members in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in members]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {split: rows[split] for split in HELD_OUT}


@dataclass(frozen=True)
class Trial:
    """A model's answers to the rows of a split."""

    answers: list[str]
    completions: list[Completion]
    right: list[bool]

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)


def answer_limit(tokenizer: Tokenizer, splits: dict[str, list[dict[str, str]]]) -> int:
    """Tokens an answer may take: SPARE_TOKENS more than the longest one wanted."""
    return SPARE_TOKENS + max(len(tokenizer.encode(row["output"])) for rows in splits.values() for row in rows)


def try_splits(
    model: Decoder, tokenizer: Tokenizer, splits: dict[str, list[dict[str, str]]], limit: int
) -> dict[str, Trial]:
    """The trial of every split, all rows in one batch: a decoding step costs little more for 100 rows than for one."""
    whole = try_rows(model, tokenizer, [row for rows in splits.values() for row in rows], limit)
    trials, start = {}, 0
    for split, rows in splits.items():
        part = slice(start, start + len(rows))
        trials[split] = Trial(whole.answers[part], whole.completions[part], whole.right[part])
        start = part.stop
    return trials


def try_rows(model: Decoder, tokenizer: Tokenizer, rows: list[dict[str, str]], limit: int) -> Trial:
    """Greedy answers to the rows' messages, in one batch."""
    model.eval()
    schema = detect(rows, "rows")
    conversations = [to_messages(row, schema, "row") for row in rows]
    answers, completions = answer(model, tokenizer, conversations, max_new_tokens=limit, batch_size=len(rows))
    return Trial(answers, completions, tasks.score(answers, rows))


def reloads_equal(
    model: Decoder, tokenizer: Tokenizer, rows: list[dict[str, str]], reloaded: Trial, limit: int
) -> bool:
    """Whether the model in memory gives, token for token, what the reloaded one gave (on the first rows)."""
    some = rows[:16]
    return [c.ids for c in try_rows(model, tokenizer, some, limit).completions] == [
        c.ids for c in reloaded.completions[: len(some)]
    ]


def show_examples(held_out: dict[str, list[dict[str, str]]], before: dict[str, Trial], after: dict[str, Trial]) -> None:
    table = Table("", "message", "before", "after", "wanted", show_lines=True)
    for split, rows in held_out.items():
        for i, row in enumerate(rows[:2]):
            table.add_row(split, row["input"], before[split].answers[i][:200], after[split].answers[i], row["output"])
    Console().print(table, markup=False)


def write_prompt(path: Path, row: dict[str, str]) -> Path:
    path.write_text(f"{row['instruction']}\n\n{row['input']}", encoding="utf-8")
    return path

"""For the tests of distillation: a base, a teacher that has learnt something from the rows, a half-depth student."""

from pathlib import Path
from typing import NamedTuple

import torch

from models import load_model, save_model
from models.shrink import shrink
from models.tokenizer import load_tokenizer
from tests.small_base import ROWS, write_base, write_rows
from trainers import sft
from trainers.distill_config import DistillConfig


class Made(NamedTuple):
    base: Path
    teacher: Path
    student: Path
    data: Path
    eval_data: Path


def make(folder: Path) -> Made:
    base = write_base(folder / "base")
    data = write_rows(folder / "rows.jsonl", ROWS[:20])
    eval_data = write_rows(folder / "eval.jsonl", ROWS[20:])
    config = sft.SFTConfig(
        data=str(data), out=str(folder / "taught"), model=str(base), method="full", max_steps=30, batch_size=4,
        accumulation=1, learning_rate=1e-2, samples=0, threads=1,
    )  # fmt: skip
    sft.train(config, quiet=True)
    teacher = folder / "taught" / "model"
    with torch.random.fork_rng():
        save_model(shrink(load_model(base), 1), folder / "student", tokenizer=load_tokenizer(base))
    return Made(base, teacher, folder / "student", data, eval_data)


def config_for(made: Made, out: Path, **changes: object) -> DistillConfig:
    fields: dict = {
        "data": str(made.data), "eval_data": str(made.eval_data), "out": str(out), "model": str(made.student),
        "teacher": str(made.teacher), "method": "full", "max_steps": 6, "batch_size": 2, "accumulation": 2, "r": 4,
        "learning_rate": 5e-3, "samples": 0, "threads": 1, "max_new_tokens": 6,
    }  # fmt: skip
    return DistillConfig(**(fields | changes))

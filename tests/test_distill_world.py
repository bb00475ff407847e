"""trainers/distill under two processes: the rows, samples, losses and student of one process with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.small_teacher import Made, config_for, make
from trainers import distill, world
from trainers.distill_config import DistillConfig
from trainers.metrics import read_metrics

ROOT = Path(__file__).parent.parent
START = "import sys; from tests.test_distill_world import train_as_rank; train_as_rank(*sys.argv[1:])"
WAYS = {
    "on-policy": {"on_policy_fraction": 0.5, "ce_weight": 0.3, "save_every": 2},
    "cached": {"teacher_top_k": 16, "beta": 0.5},
}


def config(folder: Path, who: str, name: str) -> DistillConfig:
    made = Made(*(folder / part for part in ("base", "taught/model", "student", "rows.jsonl", "eval.jsonl")))
    cache = {"teacher_cache": str(folder / f"{who}-cache")} if name == "cached" else {}
    changes = WAYS[name] | cache | {"batch_size": 2 if who == "two" else 4, "max_steps": 4}
    return config_for(made, folder / f"{who}-{name}", **changes)


def train_as_rank(folder: str, rank: str) -> None:
    """Runs in a process of its own."""
    meeting = f"file://{folder}/meeting"
    world.join(init_method=meeting, rank=int(rank), world_size=2)
    for name in WAYS:
        distill.train(config(Path(folder), "two", name), quiet=True)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds what small_teacher makes, and what two processes made of it: two-NAME/."""
    folder = tmp_path_factory.mktemp("world")
    make(folder)
    arguments = [[sys.executable, "-c", START, str(folder), str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}) for words in arguments]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_are_one_with_twice_the_rows(folder: Path, name: str) -> None:
    distill.train(config(folder, "one", name), quiet=True)
    rows, wanted = (read_metrics(folder / f"{who}-{name}" / "metrics.jsonl") for who in ("two", "one"))
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for key in ("step", "examples", "learnt_tokens", "sampled_rows", "sampled_length"):
            assert row.get(key) == other.get(key)
        for key in ("loss", "divergence", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-4)
    two, one = (load_file(folder / f"{who}-{name}" / "model" / "model.safetensors") for who in ("two", "one"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-4)
    if name == "cached":
        assert sorted(p.name for p in (folder / "two-cache").iterdir()) == [
            "eval-00000.safetensors", "eval.json", "train-00000.safetensors", "train.json",
        ]  # fmt: skip

"""DPO and ORPO over two processes (gloo, CPU): losses, rewards and weights of one process over the same window."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.pair_rows import PAIRS
from tests.small_base import write_base, write_rows
from trainers import dpo, orpo, world
from trainers.metrics import read_metrics

ROOT = Path(__file__).parent.parent
START = "import sys; from tests.test_pairs_world import train_as_rank; train_as_rank(*sys.argv[1:])"
WAYS = {
    "dpo": (dpo, dpo.DPOConfig, {"rpo_alpha": 0.5}),
    "precomputed": (dpo, dpo.DPOConfig, {"precompute_ref": True}),
    "orpo": (orpo, orpo.ORPOConfig, {"nll": "all"}),
}


def train(folder: Path, name: str, out: str, **changes) -> None:
    trainer, config, settings = WAYS[name]
    flags = config(
        data=str(folder / "pairs.jsonl"), out=str(folder / out), model=str(folder / "base"), method="lora", r=4,
        max_steps=3, learning_rate=1e-3, samples=0, threads=1, eval_fraction=0.25, batch_size=2, accumulation=2,
        **settings,
    )  # fmt: skip
    trainer.train(replace(flags, **changes), quiet=True)


def train_as_rank(folder: str, rank: str) -> None:
    """Runs in a process of its own."""
    meeting = f"file://{folder}/meeting"
    world.join(init_method=meeting, rank=int(rank), world_size=2)
    for name in WAYS:
        train(Path(folder), name, f"{name}-two")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_base(folder / "base")
    write_rows(folder / "pairs.jsonl", PAIRS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", START, str(folder), rank], cwd=ROOT, env=environment) for rank in "01"
    ]
    assert [rank.wait(timeout=280) for rank in ranks] == [0, 0]
    return folder


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_train_as_one(folder: Path, name: str) -> None:
    train(folder, name, f"{name}-one", accumulation=4)
    one, two = (read_metrics(folder / f"{name}-{ranks}" / "metrics.jsonl") for ranks in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        measured = {"seconds", "tokens_per_second", "peak_memory_bytes", "page_faults", "paging"}
        assert {key: a[key] for key in a.keys() - measured} == pytest.approx(
            {key: b[key] for key in b.keys() - measured}, rel=1e-4, abs=1e-4
        )
    weights = [load_file(folder / f"{name}-{r}" / "adapter" / "adapter_model.safetensors") for r in ("one", "two")]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], rtol=1e-2, atol=1e-4)

"""trainers/world.py: two processes of torchrun train as one with the same window: loss, gradients, metrics, files.

They draw their dropout apart, and a stopped run of two goes on to the same bytes.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import train
from data import encode_dataset
from data.schema import detect
from data.sources import read_rows
from lora import trainable_parameters
from models import load_tokenizer
from tests.small_base import write_base, write_rows
from trainers import sft, world
from trainers.logprobs import per_token_nll
from trainers.loop import count_window, train_step
from trainers.metrics import read_metrics

ROOT = Path(__file__).parent.parent
EPS = torch.finfo(torch.float32).eps


ALONE = {"batch_size": 2, "accumulation": 4}
AS_TWO = {"batch_size": 2, "accumulation": 2}
WAYS = {"plain": {}, "packed": {"packing": True, "max_seq_length": 128}, "grouped": {"group_by_length": True}}
# what two processes pad together, 4 rows, is then what one process pads together
ALONE_GROUPED = {"batch_size": 4, "accumulation": 2}


def config_for(folder: Path, name: str, changes: dict) -> sft.SFTConfig:
    return sft.SFTConfig(
        data=str(folder / "rows.jsonl"), out=str(folder / name), model=str(folder / "base"), method="lora", r=4,
        max_steps=4, learning_rate=1e-3, samples=0, threads=1, **changes,
    )  # fmt: skip


def train_as_rank(folder: str) -> None:
    """Runs in each process: for each way, a window's gradients into a file, then a whole run; then dropout."""
    with world.joined():
        for name, way in WAYS.items():
            config = config_for(Path(folder), f"two-{name}", AS_TWO | way)
            save_file(window_gradients(config), f"{folder}/{name}-{world.rank()}.safetensors")
            train.run(config)
        config = config_for(Path(folder), "two-dropout", AS_TWO | {"dropout": 0.2, "save_every": 2})
        sft.train(config, quiet=True)
        save_file({"rng": torch.get_rng_state()}, f"{folder}/rng-{world.rank()}.safetensors")
        world.wait_for_all()
        if world.is_main():
            stopped_after_two_steps(Path(config.out), Path(folder) / "two-again")
        world.wait_for_all()
        sft.train(replace(config, out=f"{folder}/two-again", resume=True), quiet=True)
    threads = [comm.read_text() for comm in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], "parted: gloo's threads could abort the exit"


def stopped_after_two_steps(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000004")
    shutil.rmtree(copy / "adapter")


def window_gradients(config: sft.SFTConfig) -> dict[str, torch.Tensor]:
    """Of the first window, with B moved off zero: what the optimizer is given."""
    rows = read_rows(config.data)
    schema = detect(rows, config.data)
    tokenizer = load_tokenizer(config.model)
    train_set = encode_dataset(tokenizer, rows, schema, max_seq_length=config.max_seq_length, path="rows")
    model = sft.prepare_model(config)
    parameters = trainable_parameters(model)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    window = config.batch_size * config.accumulation * world.world_size()
    batches = sft._batches(
        train_set, sft.data_order(config, train_set).step(window, 0), config.batch_size, tokenizer.pad_id
    )
    num_items = count_window(batches).learnt_tokens

    def loss_of(batch):
        nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
        return sft.sft_loss(nll, batch.completion_mask, num_items)

    optimizer = torch.optim.SGD([parameter for _, parameter in parameters], lr=0.0)
    loss, grad_norm = train_step(batches, loss_of, parameters, optimizer, learning_rate=0.0, max_grad_norm=0.0)
    gradients = {name: parameter.grad for name, parameter in parameters}
    return gradients | {"loss": torch.tensor(loss), "grad_norm": torch.tensor(grad_norm)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds base/, rows.jsonl, and what two processes made of them: two-NAME/ and NAME-RANK.safetensors."""
    folder = tmp_path_factory.mktemp("world")
    write_base(folder / "base")
    write_rows(folder / "rows.jsonl")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*torchrun, __file__, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if "4 steps in" in line]) == len(WAYS), "one rank speaks"
    return folder


def alone(folder: Path, name: str) -> sft.SFTConfig:
    return config_for(folder, f"one-{name}", (ALONE_GROUPED if name == "grouped" else ALONE) | WAYS[name])


@pytest.mark.parametrize("name", WAYS)
def test_loss_and_gradients_of_a_window(folder: Path, name: str) -> None:
    wanted = window_gradients(alone(folder, name))
    for rank in range(2):
        gradients = load_file(folder / f"{name}-{rank}.safetensors")
        assert gradients.keys() == wanted.keys()
        for key, gradient in gradients.items():
            assert (gradient - wanted[key]).norm() <= 8 * EPS * wanted[key].norm(), key


@pytest.mark.parametrize("name", WAYS)
def test_metrics_and_files_of_a_run(folder: Path, name: str) -> None:
    """Loss and gradient norm were measured to differ by at most one rounding in four updates."""
    sft.train(alone(folder, name), quiet=True)
    rows, wanted = (read_metrics(folder / f"{who}-{name}" / "metrics.jsonl") for who in ("two", "one"))
    assert len(rows) == len(wanted) == 4
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for key in ("step", "learning_rate", "tokens", "learnt_tokens", "examples"):
            assert row[key] == other[key]
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=4 * EPS)
    saved = json.loads((folder / f"two-{name}" / "config.json").read_text())["environment"]
    assert saved["world_size"] == 2
    assert (folder / f"two-{name}" / "adapter" / "adapter_model.safetensors").is_file()


def test_ranks_draw_their_dropout_apart_and_a_resumed_run_draws_it_again(folder: Path) -> None:
    states = [load_file(folder / f"rng-{rank}.safetensors")["rng"] for rank in range(2)]
    assert not torch.equal(*states)
    whole, again = ((folder / name / "adapter" / "adapter_model.safetensors") for name in ("two-dropout", "two-again"))
    assert whole.read_bytes() == again.read_bytes()


if __name__ == "__main__":
    train_as_rank(sys.argv[1])

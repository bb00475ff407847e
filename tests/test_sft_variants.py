"""trainers/sft with DoRA and with starts out of the weights: it learns, resumes to the same bytes, its folder loads."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora import load_adapter
from models import load_model
from tests.small_base import write_base, write_rows
from tests.test_sft import adapter_bytes
from trainers import sft
from trainers.checkpoint import all_checkpoints

WAYS = [
    ("lora", {"use_dora": True}),
    ("qlora", {"use_dora": True}),
    ("lora", {"init": "pissa"}),
    ("qlora", {"init": "pissa"}),
    ("qlora", {"init": "olora"}),
    ("qlora", {"init": "loftq", "loftq_iterations": 2}),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.mark.parametrize(("method", "flags"), WAYS, ids=str)
def test_it_learns_resumes_and_loads(base: Path, tmp_path: Path, method: str, flags: dict) -> None:
    config = sft.SFTConfig(
        data=str(write_rows(tmp_path / "rows.jsonl")), out=str(tmp_path / "run"), model=str(base), method=method,
        max_steps=6, batch_size=4, accumulation=1, r=2, learning_rate=5e-3, samples=0, threads=1, save_every=3,
        **flags,
    )  # fmt: skip
    trained = sft.train(config, quiet=True)
    out, ids = Path(config.out), torch.arange(20)[None]
    belongs_to = out / "base" if (out / "base").is_dir() else base
    assert (belongs_to != base) == (method == "qlora" and "init" in flags)
    again = load_model(belongs_to, quantize="nf4" if method == "qlora" and belongs_to == base else None)
    load_adapter(again, out / "adapter")
    with torch.no_grad():
        here, there = trained.model.eval()(ids), again.eval()(ids)
    if method == "lora" and "init" in flags:  # its file is the difference of two updates, each as large as the weight
        assert float((here - there).norm() / here.norm()) < 100 * torch.finfo(torch.float32).eps
    else:
        assert torch.equal(here, there)

    finished = sft.train(replace(config, resume=True), quiet=True)
    assert torch.equal(finished.model.eval()(ids).detach(), there)
    whole = adapter_bytes(out)
    shutil.rmtree(out / "adapter")
    shutil.rmtree(all_checkpoints(out / "checkpoints")[-1])
    sft.train(replace(config, resume=True), quiet=True)
    assert adapter_bytes(out) == whole

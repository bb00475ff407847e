"""qlora combine: the folder it writes gives the sum of both adapters; a mistake is one line."""

from pathlib import Path

import pytest
import torch

import qlora
from lora import LoRAConfig, add_adapter, load_adapter, save_adapter, set_adapter
from models import load_model, load_tokenizer
from tests.small_base import write_base


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base and two adapters of it."""
    base = write_base(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = add_adapter(load_model(base), LoRAConfig(r=2 + seed, alpha=4))
        for path, parameter in model.named_parameters():
            if "lora_B" in path:
                parameter.data.normal_(std=0.1)
        save_adapter(model, tmp_path / name, base_model_name=str(base), beside=load_tokenizer(base).save)
    return [base, tmp_path / "one", tmp_path / "two"]


def test_the_sum_of_two(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, one, two = folders
    out, ids = tmp_path / "both", torch.arange(12)[None]
    assert qlora.main(["combine", str(base), str(out), "--adapters", str(one), str(two)]) == 0
    assert capsys.readouterr().out == f"{out}: cat of 2 adapters, rank 5\n"
    both = load_model(base)
    load_adapter(both, one, "one")
    load_adapter(both, two, "two")
    set_adapter(both, ["one", "two"])
    with torch.no_grad():
        apart, together = both.eval()(ids), load_adapter(load_model(base), out).eval()(ids)
    # the same products, in other sums: as near as fp32 leaves one forward
    assert float((apart - together).norm() / apart.norm()) < 100 * torch.finfo(torch.float32).eps
    assert (out / "tokenizer.json").is_file()


def test_a_mistake_is_one_line(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, one, _ = folders
    assert qlora.main(["combine", str(base), str(tmp_path / "out"), "--adapters", str(one)]) == 2
    assert capsys.readouterr().err == (
        "qlora combine: combining needs two adapters or more, each once, got ['adapter_1']\n"
    )

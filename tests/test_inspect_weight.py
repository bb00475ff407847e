"""qlora inspect weight and inspect adapter: each number shown, worked out again from the paper's rules."""

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qlora
from commands.inspect_adapter import change, effective_rank
from commands.inspect_weight import walk
from lora import LoRAConfig, add_adapter, save_adapter
from lora.adapters import lora_layers
from models import load_model, save_model
from models.load import load_weight
from quant import quantize
from quant.codebook import nf4_codebook
from tests.small_base import write_base

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


def test_a_block_by_hand(base: Path) -> None:
    path, weight = load_weight(base, "layers.1.mlp.up_proj")
    assert path == LAYER
    assert torch.equal(weight, load_file(base / "model.safetensors")[f"{LAYER}.weight"].float())
    q = quantize(weight, blocksize=32, double_quant=False)
    block = walk(weight, q, 2)
    floats = weight.flatten()[64:96].tolist()
    absmax = max(map(abs, floats))
    levels = nf4_codebook().tolist()
    assert block.absmax == block.stored_absmax == absmax
    for w, s, index, back in zip(floats, block.scaled, block.indices, block.back, strict=True):
        nearest = min(range(16), key=lambda i: abs(levels[i] - w / absmax))
        assert int(index) == nearest
        assert float(s) == pytest.approx(w / absmax, rel=1e-6)
        assert float(back) == pytest.approx(levels[nearest] * absmax, rel=1e-6)
    assert int(q.packed[32]) == int(block.indices[0]) * 16 + int(block.indices[1])


def test_what_is_printed(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    picture = tmp_path / "new" / "weight.png"
    assert (
        qlora.main(["inspect", "weight", str(base), LAYER, "--block", "1", "--show", "2", "--plot", str(picture)]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    _, weight = load_weight(base, LAYER)
    q = quantize(weight)
    assert lines[0].startswith(f"{LAYER}: {weight.shape[0]} × {weight.shape[1]}, nf4, ")
    at, w, s, index, _, bits, level, *byte, back, error = lines[2].split()
    assert (int(at), float(w)) == (64, pytest.approx(float(weight.flatten()[64]), abs=1e-6))
    assert int(bits, 2) == int(index) == int(q.packed[32]) >> 4 == int(byte[0], 2)
    assert float(back) - float(w) == pytest.approx(float(error), abs=2e-6)
    assert float(level) * float(q.scales()[1]) == pytest.approx(float(back), abs=2e-6)
    assert float(s) == pytest.approx(float(w) / float(weight.flatten()[64:128].abs().max()), abs=1e-3)
    stored = float(re.search(r"= (\d+\.\d+), off by", lines[5])[1])
    assert stored == pytest.approx(float(q.scales()[1]), abs=1e-6)
    assert sum(float(share) for share in re.findall(r":(\d+\.\d)%", lines[6])) == pytest.approx(100, abs=1)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_stored_4bit_weight_has_no_floats(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_model(load_model(base, quantize="nf4"), tmp_path / "four")
    _, q = load_weight(tmp_path / "four", LAYER)
    assert torch.equal(q.packed, quantize(load_weight(base, LAYER)[1]).packed)
    assert qlora.main(["inspect", "weight", str(tmp_path / "four"), LAYER]) == 0
    assert "whole weight" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up_proj"], "one linear layer's path must end in 'up_proj', and 2 do, the first model.layers.0.mlp.up_proj"),
        (["nothing"], "one linear layer's path must end in 'nothing', and none does: try model.layers.0"),
        ([LAYER, "--block", "-1"], "--block must lie between 0 and"),
    ],
)
def test_a_mistake_is_one_line(base: Path, capsys: pytest.CaptureFixture, arguments: list, said: str) -> None:
    assert qlora.main(["inspect", "weight", str(base), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_effective_rank() -> None:
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(20, 4))
    V, _ = torch.linalg.qr(torch.randn(30, 4))
    assert effective_rank(V.T, U) == pytest.approx(4, rel=1e-6)
    weights = [8.0, 4.0, 2.0, 2.0]
    shares = [w / sum(weights) for w in weights]
    wanted = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(V.T, U * torch.tensor(weights)) == pytest.approx(wanted, rel=1e-6)
    assert effective_rank(V.T[:1], U[:, :1]) == pytest.approx(1)
    assert effective_rank(V.T, torch.zeros(20, 4)) == 0


def test_an_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = add_adapter(load_model(base), LoRAConfig(r=2, alpha=4, target_modules=["up_proj", "q_proj"]))
    model.requires_grad_(False)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].data.normal_(std=0.01)
    save_adapter(model, tmp_path / "adapter")
    layer = lora_layers(model)[LAYER]
    found = change(LAYER, layer)
    W = layer.base_layer.weight.double()
    delta = 2 * (layer.lora_B["default"].double() @ layer.lora_A["default"].double())
    assert found.delta == pytest.approx(float(delta.norm()), rel=1e-5)
    rounded = (W + delta).float().bfloat16().double()
    assert found.bf16 == pytest.approx(float((rounded - W - delta).norm() / delta.norm()), rel=1e-3)
    assert qlora.main(["inspect", "adapter", str(tmp_path / "adapter"), "--model", str(base)]) == 0
    out = capsys.readouterr().out
    assert [kind for kind in ("q_proj", "up_proj") if kind in out] == ["q_proj", "up_proj"]
    assert qlora.main(["inspect", "adapter", str(tmp_path / "adapter"), "--model", str(base), "--layers"]) == 0
    assert out.count("\n") < capsys.readouterr().out.count("\n")

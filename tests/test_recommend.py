"""What qlora recommend must say in named cases, that it refuses what cannot fit, and that its config runs."""

import json

import pytest

import qlora
from models.well_known import WELL_KNOWN
from trainers.memory import plan
from trainers.recommend import FREE, recommend

from .small_base import write_base, write_rows

CASES = {  # model, rows, longest row, GB → what must come out
    "a laptop, a small model": (
        ("smollm2-135m", 2_000, 300, 4),
        {"method": "lora", "r": 16, "learning_rate": 2e-4, "epochs": 3.0, "max_seq_length": 320, "batch_size": 8,
         "accumulation": 2, "gradient_checkpointing": False, "dtype": "fp32"},
    ),
    "a card of 24 GB, 8B, short rows: the dense base fits": (
        ("llama-3.1-8b", 52_000, 700, 24),
        {"method": "lora", "r": 32, "learning_rate": 2e-4, "epochs": 3.0, "max_seq_length": 704, "batch_size": 8,
         "accumulation": 2, "gradient_checkpointing": True, "dtype": "bf16"},
    ),
    "a card of 12 GB, 8B: four bits": (
        ("llama-3.1-8b", 52_000, 700, 12),
        {"method": "qlora", "r": 32, "max_seq_length": 704, "batch_size": 4, "accumulation": 4,
         "gradient_checkpointing": True},
    ),
    "rows longer than half of the context": (
        ("llama-2-7b", 1_000, 4_000, 16),
        {"method": "qlora", "r": 16, "max_seq_length": 2_048, "batch_size": 4, "accumulation": 4, "epochs": 3.0},
    ),
    "three million rows, a small model: full": (
        ("qwen2.5-0.5b", 3_000_000, 500, 24),
        {"method": "full", "learning_rate": 2e-5, "epochs": 1.0, "max_seq_length": 512, "batch_size": 16,
         "accumulation": 1, "gradient_checkpointing": False},
    ),
    "one and a half million rows, 13B in 24 GB": (
        ("llama-2-13b", 1_500_000, 600, 24),
        {"method": "qlora", "r": 64, "alpha": 64.0, "learning_rate": 2e-4, "epochs": 2.0, "max_seq_length": 640,
         "batch_size": 16, "accumulation": 1},
    ),
    "70B in 80 GB: half the rate": (
        ("llama-3.1-70b", 20_000, 1_500, 80),
        {"method": "qlora", "r": 16, "learning_rate": 1e-4, "epochs": 3.0, "max_seq_length": 1_536},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_named_cases(name: str) -> None:
    (model, rows, longest, gigabytes), wanted = CASES[name]
    found = recommend(WELL_KNOWN[model], [1] * (rows - 1) + [longest], gigabytes * 10**9, on_gpu=True)
    flags = found.flags()
    assert {flag: flags[flag] for flag in wanted} == wanted
    assert found.plan.total == plan(WELL_KNOWN[model], found.plan.setup).total <= (1 - FREE) * gigabytes * 1e9
    assert ("r" in flags) == (flags["method"] != "full")
    assert flags["batch_size"] * flags["accumulation"] == 16
    assert all(one.reason and one.source for one in found.advice)


def test_a_smaller_rank_before_a_refusal() -> None:
    config, lengths = WELL_KNOWN["qwen2.5-14b"], [512] * 600_000
    ranks = {}
    for gigabytes in (12, 13, 14, 16, 24):
        try:
            ranks[gigabytes] = recommend(config, lengths, gigabytes * 10**9).flags()["r"]
        except ValueError:
            ranks[gigabytes] = 0
    assert sorted(ranks.values()) == list(ranks.values())
    assert {0, 16, 64} <= set(ranks.values())


def test_refuses_what_cannot_fit() -> None:
    with pytest.raises(ValueError, match=r"llama-3.1-70b cannot be trained in 24 GB: QLoRA with one row of 1,536 tok"):
        recommend(WELL_KNOWN["llama-3.1-70b"], [1_500] * 100, 24 * 10**9, name="llama-3.1-70b")
    with pytest.raises(ValueError, match="no rows"):
        recommend(WELL_KNOWN["llama-3.1-70b"], [], 24 * 10**9)


def test_the_config_runs(tmp_path, capsys) -> None:
    base, rows = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    config, out = tmp_path / "config.json", tmp_path / "run"
    args = ["recommend", "--data", str(rows), "--model", str(base), "--out", str(out), "--write", str(config)]
    assert qlora.main([*args, "--memory", "1"]) == 0
    written = json.loads(config.read_text())["config"]
    assert (written["method"], written["r"], written["target_modules"]) == ("lora", 16, "all-linear")
    assert "LoRA Without Regret" in " ".join(capsys.readouterr().out.split())
    assert qlora.main(["sft", "--config", str(config), "--max-steps", "1", "--samples", "0"]) == 0
    assert (out / "adapter" / "adapter_config.json").exists()
    assert qlora.main([*args, "--memory", "0.0001"]) == 2
    assert "cannot be trained in 0.0001 GB" in capsys.readouterr().err

"""trainers/recipes.py: each warning fires where its rule is broken, and not just inside it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.small_base import write_base, write_rows
from trainers import sft
from trainers.recipes import Recipe, default_learning_rate, warnings

ADAPTER = Recipe(
    method="qlora", learning_rate=2e-4, parameters=7_000_000_000, r=16, scaling=1.0, use_rslora=False,
    targets=frozenset({"q_proj", "v_proj", "up_proj"}), rows=1000, truncated=0, dropped=0, examples=1000, longest=900,
    context=2048, steps=62, warmup_ratio=0.05, warmup_steps=3, examples_per_update=16.0, padding=0.1, packing=False,
)  # fmt: skip
FULL = replace(ADAPTER, method="full", learning_rate=2e-5)
SMALL = replace(ADAPTER, parameters=135_000_000)
SHORT, SHORT_FULL = replace(ADAPTER, steps=10), replace(FULL, steps=10)


def test_the_defaults_need_no_warning() -> None:
    for recipe in (ADAPTER, FULL, replace(ADAPTER, method="lora")):
        assert recipe.learning_rate == default_learning_rate(recipe.method)
        assert warnings(recipe) == []


CASES = [
    (FULL, {"learning_rate": 1e-4}, {"learning_rate": 9e-5}, "learning rate 0.0001 is one for adapters: full"),
    (ADAPTER, {"learning_rate": 5e-5}, {"learning_rate": 6e-5}, "learning rate 5e-05 is one for full"),
    (ADAPTER, {"learning_rate": 6e-4}, {"learning_rate": 5e-4}, "learning rate 0.0006 is above 0.0005"),
    (SMALL, {"learning_rate": 6e-3}, {"learning_rate": 5e-3}, "learning rate 0.006 is above 0.005"),
    (ADAPTER, {"scaling": 4.1}, {"scaling": 4.0}, "alpha/r is 4.1, outside 0.25 to 4"),
    (ADAPTER, {"scaling": 0.2, "use_rslora": True}, {"scaling": 0.25}, "alpha/√r is 0.2, outside 0.25 to 4"),
    (ADAPTER, {"r": 128}, {"r": 128, "use_rslora": True}, "rank 128 with alpha/r"),
    (ADAPTER, {"targets": frozenset({"q_proj", "v_proj"})}, {"targets": frozenset({"q_proj", "up_proj"})}, "attention"),
    (ADAPTER, {"truncated": 51}, {"truncated": 50}, "5% of the rows are cut"),
    (ADAPTER, {"dropped": 1}, {"dropped": 0}, "1 rows are left out"),
    (ADAPTER, {"longest": 2049}, {"longest": 2048}, "longest example has 2,049 tokens, the model's context 2,048"),
    (ADAPTER, {"padding": 0.3}, {"padding": 0.25}, "30% of the batches is padding"),
    (ADAPTER, {"padding": 0.3}, {"padding": 0.3, "packing": True}, "try --packing"),
    (ADAPTER, {"steps": 189}, {"steps": 188}, "every row is seen 3.0 times"),
    (ADAPTER, {"steps": 9, "warmup_steps": 0}, {"warmup_ratio": 0.0, "warmup_steps": 0}, "5% of 9 steps is no warm-up"),
    (ADAPTER, {"examples_per_update": 2.0}, {"examples_per_update": 4.0}, "2 examples an update make"),
    (SHORT, {"examples_per_update": 65.0}, {"examples_per_update": 64.0}, "65 examples an update: LoRA"),
    (SHORT_FULL, {"examples_per_update": 101.0}, {"examples_per_update": 100.0}, "an epoch is 9.9 updates"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "wrong", "right", "message"), CASES)
def test_a_warning_fires_beyond_its_limit_only(recipe: Recipe, wrong: dict, right: dict, message: str) -> None:
    assert warnings(replace(recipe, **right)) == []
    (line,) = warnings(replace(recipe, **wrong))
    assert message in line
    assert "\n" not in line


def test_full_fine_tuning_hears_nothing_about_adapters() -> None:
    assert warnings(replace(SHORT_FULL, scaling=100.0, r=512, targets=frozenset(), examples_per_update=65.0)) == []


def test_a_run_says_its_warnings_and_keeps_them(tmp_path: Path, capsys) -> None:
    """Every number that a rule judges comes from the run: its flags, its data, its model."""
    base = write_base(tmp_path / "base")
    config = sft.SFTConfig(
        data=str(write_rows(tmp_path / "rows.jsonl")), out=str(tmp_path / "run"), model=str(base), max_steps=1,
        learning_rate=1e-5, r=4, alpha=32, target_modules="q_proj,k_proj", max_seq_length=40, samples=0, threads=1,
        batch_size=1, accumulation=2,
    )  # fmt: skip
    sft.train(config)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["warnings"]
    assert [f"warning: {line}" for line in kept] == said
    expected = ["learning rate 1e-05", "alpha/r is 8", "attention", "of the rows are cut", "no warm-up", "2 examples"]
    assert len(kept) == len(expected)
    assert all(start in line for start, line in zip(expected, kept, strict=True))

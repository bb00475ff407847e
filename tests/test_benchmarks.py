"""benchmarks/: the README's tables are what the CSV files say; the memory counter counts; rows replace their like."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import results, tables
from benchmarks.bench_linear_cross_entropy import peak_resident_bytes
from benchmarks.bench_train_step import LiveBytes

ROOT = Path(__file__).parent.parent


def test_the_readme_tables_are_those_of_the_csv_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: train_step -->" in text
    assert tables.with_tables(text) == text


def test_a_mark_without_a_table_is_refused():
    with pytest.raises(ValueError, match=r"speed_of_light.*names no table.*train_step"):
        tables.with_tables("<!-- table: speed_of_light -->\n<!-- end of table -->")


def test_the_table_of_compiled_kernels_goes_from_the_lowest_count_to_the_highest():
    counted = [
        ("sm_80", "forward", "16x128", "6.12"),
        ("sm_80", "forward", "64x128", "8.33"),
        ("sm_80", "forward", "32x128", ""),
        ("sm_90", "forward", "64x256", "5.43"),
        ("sm_80", "bitsandbytes 0.50.2", "forward 32x64x64", "9.5"),
        ("sm_80", "bitsandbytes 0.50.2", "forward simt M=1", "8.34"),
    ]
    table = tables.compile_table(
        [dict(zip(("target", "kernel", "config", "per_weight"), row, strict=True)) for row in counted]
    )
    rows = {tuple(line.split(" | ")[:2]): line.split(" | ")[3:] for line in table}
    assert rows["| y = x · Ŵᵀ, other M", "ours"] == ["6.1 to 8.3", "-", "-", "5.4", "-", "- |"]
    assert rows["| y = x · Ŵᵀ, other M", "bitsandbytes 0.50.2"] == ["9.5", "-", "-", "-", "-", "- |"]
    assert rows["| y = x · Ŵᵀ, M = 1", "bitsandbytes 0.50.2"] == ["8.3", "-", "-", "-", "-", "- |"]
    assert ("| dx = dy · Ŵ", "bitsandbytes 0.50.2") not in rows


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_resident_peak_falls_when_it_is_reset_and_rises_with_what_is_used():
    held = torch.ones(16 << 20, dtype=torch.uint8)
    del held
    Path("/proc/self/clear_refs").write_text("5")
    low = peak_resident_bytes()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_resident_bytes() - low >= 0.9 * held.nbytes


def test_live_bytes_are_the_largest_sum_of_living_storages():
    x = torch.ones(1000, requires_grad=True)  # 4,000 bytes
    with LiveBytes([x]) as live:
        y = x.exp()  # + 4,000, kept for backward too
        assert (live.now, live.peak) == (8000, 8000)
        z = y.view(10, 100)  # no bytes of its own
        (y * 3).sum()  # + 4,000 and a sum of 4 bytes, both gone at once
        assert (live.now, live.peak) == (8000, 12004)
        del y, z
        assert live.now == 4000
    with LiveBytes([x]) as live:
        loss = x.exp().sum()
        loss.backward()  # the ones of the sum's gradient are a view; exp's gradient is a product of 4,000 bytes
        assert x.grad is not None
        assert live.peak >= 4000 + 4000 + x.grad.nbytes


def test_rows_replace_the_rows_of_the_same_key_and_keep_others(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.write_rows("speed", [{"dtype": "fp32", "value": 1}, {"dtype": "fp32", "value": 2}], key="dtype")
    results.write_rows("speed", [{"dtype": "bf16", "value": 3}], key="dtype")
    results.write_rows("speed", [{"dtype": "fp32", "value": 4}], key="dtype")
    rows = results.read_rows(tmp_path / "speed.csv")
    assert [(row["dtype"], row["value"]) for row in rows] == [("bf16", "3"), ("fp32", "4")]
    assert all(row["torch"] == torch.__version__ and row["commit"] for row in rows)
    assert [p.name for p in tmp_path.iterdir()] == ["speed.csv"]

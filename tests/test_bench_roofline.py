"""qlora bench roofline against numbers worked out by hand, and its bytes against what quantize stores."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

import quant
from benchmarks import bench_roofline
from benchmarks.bench_roofline import GPUS, bound, weight_bytes
from benchmarks.shapes import MODELS, ROWS


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 576), (300, 4096), (3, 5)])
def test_weight_bytes_are_those_that_quantize_stores(shape, double_quant):
    tensors = quant.quantize(torch.randn(shape), double_quant=double_quant).tensors()
    maps = ("code", "absmax_code", "absmax_offset")  # one map for all layers, and 4 bytes
    assert weight_bytes(*shape, double_quant) == sum(t.nbytes for name, t in tensors.items() if name not in maps)


def test_decoding_a_square_layer_on_an_a100():
    """4096²: 8,388,608 bytes of codes, 262,144 of scales, 4,096 of scales of scales; x and y 16,384 bytes together.

    8,671,232 / 2039e9 = 4.2527 µs; 2 · 4096² = 33,554,432 FLOPs at 108 · 1.41e9 · 2048 = 311.87e12 take 0.10759 µs.
    Dense: (33,554,432 + 16,384) / 2039e9 = 16.464 µs. First: (8,654,848 + 33,554,432) / 2039e9 = 20.701 µs more.
    """
    b = bound("A100", "llama-3-8b", "q, o", 1)
    assert (b.bytes, b.flops) == (8_671_232, 33_554_432)
    assert b.intensity == pytest.approx(3.8696, abs=1e-4)
    assert b.memory_us == pytest.approx(4.2527, abs=1e-4)
    assert b.compute_us == pytest.approx(0.10759, abs=1e-5)
    assert (b.bound_us, b.bound_by) == (b.memory_us, "memory")
    assert b.dense_us == pytest.approx(16.464, abs=1e-3)
    assert b.dequantized_first_us == pytest.approx(16.464 + 20.701, abs=1e-3)


def test_a_training_batch_on_an_h100_is_bound_by_compute():
    """M = 4096: 2 · 4096³ = 137.44e9 FLOPs at 132 · 1.83e9 · 4096 = 989.4e12 take 138.91 µs, all ways but for reading
    the weight first: without double quantization 42,991,616 bytes at 3350e9, 12.833 µs."""
    b = bound("H100", "llama-3-8b", "q, o", 4096, double_quant=False)
    assert b.compute_us == pytest.approx(138.91, abs=1e-2)
    assert (b.bound_us, b.bound_by, b.dense_us) == (b.compute_us, "compute", b.compute_us)
    assert b.dequantized_first_us - b.dense_us == pytest.approx(12.833, abs=1e-3)


@pytest.mark.parametrize(("gpu", "teraflops"), [("A100", 312), ("L4", 121), ("4090", 165), ("H100", 989)])
def test_peaks_are_those_of_the_data_sheets(gpu, teraflops):
    assert GPUS[gpu].peak / 1e12 == pytest.approx(teraflops, rel=0.005)


def test_the_table_and_the_csv(tmp_path, monkeypatch, capsys):
    path = tmp_path / "roofline.csv"
    flags = ["--models", "smollm2-135m", "llama-3-70b", "--gpus", "L4", "B200", "--csv", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench_roofline", *flags])
    bench_roofline.main()
    printed = capsys.readouterr().out
    assert "llama-3-70b: µs at least" in printed
    assert "not measurements" in printed
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * len(MODELS["llama-3-70b"]) * len(ROWS)
    assert rows[0]["bound_by"] == "memory"
    assert float(rows[0]["bound_us"]) == pytest.approx(bound("L4", "smollm2-135m", "k, v", 1).bound_us, rel=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["roofline.csv"]

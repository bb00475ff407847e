"""bench_lora_matmul and bench_linear_cross_entropy: the arms compute one thing, and the gate sees one that does not."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_linear_cross_entropy as cross_entropy
from benchmarks import bench_lora_matmul as lora_matmul
from quant import quantize

PASSES = (cross_entropy.FORWARD, cross_entropy.FROZEN, cross_entropy.TRAINED)


def test_lora_gate_passes_all_arms_and_stops_a_wrong_one():
    pytest.importorskip("peft")
    q, A, B = quantize(torch.randn(96, 64)), torch.randn(4, 64), torch.randn(96, 4)
    x, dy = torch.randn(3, 64), torch.randn(3, 96)
    layers = lora_matmul.layers_of(q, A, B, torch.float32, no_peer=False)
    assert list(layers) == ["dense torch", "ours", "peft + bitsandbytes"]
    lora_matmul.gate(layers, x, dy, q, A, B)
    for arm in ("ours", "peft + bitsandbytes"):
        layer, adapter = layers[arm]
        wrong = layers | {arm: (lambda x, layer=layer: layer(x) * 1.001, adapter)}
        with pytest.raises(ValueError, match=r"y of \(3, 64\) by \(96, 64\): error .*, plain torch's is"):
            lora_matmul.gate(wrong, x, dy, q, A, B)


@pytest.mark.parametrize("passes", PASSES)
def test_cross_entropy_gate(passes, monkeypatch):
    arms = [cross_entropy.OURS] if passes == cross_entropy.TRAINED else [cross_entropy.OURS, cross_entropy.FOUR_BIT]
    for arm in arms:
        cross_entropy.gate(arm, passes, 7, 100, 64, "fp32")
        assert len(cross_entropy.call_of(arm, passes, 7, 100, 64, "fp32")()) == 1 + PASSES.index(passes)
    real = cross_entropy.kernels.linear_cross_entropy
    monkeypatch.setattr(cross_entropy.kernels, "linear_cross_entropy", lambda *call: real(*call, temperature=1.001))
    with pytest.raises(ValueError, match=r"ours, forward.*nll of 7 rows over 100 words: error"):
        cross_entropy.gate(cross_entropy.OURS, passes, 7, 100, 64, "fp32")

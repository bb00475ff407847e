"""optim beside bitsandbytes' AdamW8bit on the CPU: its quantizer is approximate, ours exact; both stay near torch."""

import bitsandbytes
import torch
from torch import nn

from optim import PagedAdamW


def run(make, start: torch.Tensor, gradients: list[torch.Tensor]) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    p = nn.Parameter(start.clone())
    optimizer = make([p])
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach(), optimizer


def test_twenty_steps_stay_as_near_to_32_bits_as_bitsandbytes():
    start = torch.randn(300, 128) * 0.1
    gradients = [torch.randn(300, 128) * 0.01 for _ in range(20)]
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.01}
    exact, _ = run(lambda p: torch.optim.AdamW(p, **options), start, gradients)
    theirs, their_optimizer = run(lambda p: bitsandbytes.optim.AdamW8bit(p, **options), start, gradients)
    ours, our_optimizer = run(lambda p: PagedAdamW(p, state_bits=8, **options), start, gradients)
    error, allowed = ((x - exact).abs().mean() for x in (ours, theirs))
    assert error <= 1.02 * allowed, "its table is approximate, ours is exact"
    mine = our_optimizer.state_dict()["state"][0]
    (state,) = their_optimizer.state.values()
    assert mine["exp_avg"].shape == state["state1"].shape
    assert mine["exp_avg_absmax"].shape == state["absmax1"].shape
    for codes, their_codes in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
        apart = (mine[codes].int() - state[their_codes].int()).abs()
        assert apart.float().mean() < 1
    torch.testing.assert_close(mine["exp_avg_absmax"], state["absmax1"], rtol=0.02, atol=0)


def test_small_tensors_keep_32_bits_in_both():
    start, gradients = torch.randn(4095), [torch.randn(4095) for _ in range(5)]
    theirs, their_optimizer = run(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3), start, gradients)
    ours, our_optimizer = run(lambda p: PagedAdamW(p, lr=1e-3, state_bits=8), start, gradients)
    (state,) = their_optimizer.state.values()
    assert state["state1"].dtype == our_optimizer.state_dict()["state"][0]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # its own test's tolerance for 32 bits

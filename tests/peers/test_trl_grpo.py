"""trainers/grpo against TRL's GRPOTrainer: its loss, run on the same numbers, for a window of one batch.

GSPO-token is not here: TRL 1.16 no longer has it. At level "sequence" TRL's clip ratios count sequences, ours tokens.
"""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from tests.test_grpo_loss import B, T, inputs
from trainers.grpo import LOSS_TYPES, group_advantages, grpo_loss

EPS = torch.finfo(torch.float64).eps
CASES = list(itertools.product(LOSS_TYPES, ("token", "sequence"), (None, 1.35), (0.0, 0.04)))


def trl_loss(logps, old, ref, advantages, mask, *, loss_type, level, delta, beta):
    """TRL's own method, on a trainer that has the settings and hands out these log-probabilities."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, _metrics={"train": defaultdict(list)},
        importance_sampling_level=level, loss_type=loss_type, beta=beta, epsilon_low=0.2, epsilon_high=0.28,
        max_completion_length=9,
    )  # fmt: skip
    batch = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, T),
        "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    return loss, {key: values[0] for key, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize(("loss_type", "level", "delta", "beta"), CASES)
def test_loss_and_gradient_are_trls(loss_type, level, delta, beta):
    for seed in range(3):
        logps, old, ref, advantages, mask = inputs(seed)
        ours, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
        loss, metrics = grpo_loss(
            ours, old, advantages, mask, ref_per_token_logps=ref, beta=beta, delta=delta, epsilon_high=0.28,
            loss_type=loss_type, importance_sampling_level=level, max_completion_length=9,
        )  # fmt: skip
        wanted, said = trl_loss(
            theirs, old, ref, advantages, mask, loss_type=loss_type, level=level, delta=delta, beta=beta
        )
        assert loss.item() == pytest.approx(wanted.item(), abs=32 * EPS)
        gradients = torch.autograd.grad(loss, ours)[0], torch.autograd.grad(wanted, theirs)[0]
        torch.testing.assert_close(*gradients, rtol=0, atol=32 * EPS)
        if level == "token":
            assert metrics["clip_ratio/low"] == pytest.approx(said["clip_ratio/low_mean"])
            assert metrics["clip_ratio/high"] == pytest.approx(said["clip_ratio/high_mean"])
        if beta:
            assert metrics["kl"] == pytest.approx(said["kl"])


def test_the_deviation_is_trls():
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[5] = torch.nan
    groups = rewards.view(3, 4)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    for scale, std in (("group", nanstd(groups, dim=1, keepdim=True)), ("batch", nanstd(rewards))):
        wanted = (centred / (std + 1e-4)).flatten().nan_to_num()
        torch.testing.assert_close(group_advantages(rewards, 4, scale=scale).double(), wanted, rtol=1e-6, atol=1e-7)

"""DPO and ORPO against TRL: its losses and metrics on random tensors, with gradients, and its trainers on a real model.

TRL 1.16 ignores label smoothing where loss_type is sigmoid, so it has no cDPO. Its `aot` has, over a batch that it
sorts: of one pair, which is sorted already, it is cDPO. It has no IPO of sums. Its `sft` loss is a mean over a batch's
tokens, where RPO's paper has a mean over each answer's: equal where the answers are of one length.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOTrainer

from data.encode import Encoded
from tests.pair_rows import PAIRS, encoded
from tests.small_base import write_base, write_rows
from trainers.dpo import DPOConfig as OurConfig
from trainers.dpo import dpo_loss, rpo_term, train
from trainers.logprobs import sequence_logps
from trainers.metrics import read_metrics
from trainers.orpo import orpo_loss

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor
)


def batch(B: int = 5, T: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """completion_mask (2B, T) with a single token and a row without any, per-token logps (2B, T-1), ref sums (2B,)."""
    mask = (torch.rand(2 * B, T) < 0.6).long()
    mask[:, 0] = 0
    mask[0] = mask[B + 1] = 0
    mask[1, 1:] = torch.arange(1, T) == 4
    logps = (-3 * torch.rand(2 * B, T - 1, dtype=torch.float64)).requires_grad_()
    return mask, logps, -10 * torch.rand(2 * B, dtype=torch.float64)


def trl_dpo(mask: Tensor, logps: Tensor, ref: Tensor, kinds: list[str], weights: list[float], beta: float, eps: float):
    """TRL's loss and metrics, its model replaced by one that gives these log-probabilities."""
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(log_probs=logps * mask[:, 1:], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    metrics: dict[str, list[float]] = {key: [] for key in TRL_METRICS}
    trainer = SimpleNamespace(
        model=torch.nn.Module(), accelerator=ACCELERATOR, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=kinds, loss_weights=weights, beta=beta,
        label_smoothing=eps, use_weighting=False, _metrics={"train": metrics}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    ref_chosen, ref_rejected = ref.chunk(2)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask,
              "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, {key: values[0] for key, values in metrics.items() if key.startswith(("rewards", "logps"))}


TRL_METRICS = (
    "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "rewards/chosen", "rewards/rejected",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip


def ours(mask: Tensor, logps: Tensor, ref: Tensor, **settings) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, both rewards, and the sums of both answers."""
    chosen, rejected = sequence_logps(logps, mask[:, 1:]).chunk(2)
    chosen_lengths, rejected_lengths = mask.sum(dim=1).chunk(2)
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    return *dpo_loss(chosen, rejected, *ref.chunk(2), **lengths, **settings), chosen, rejected


def assert_same(loss: Tensor, leaf: Tensor, wanted: Tensor, wanted_leaf: Tensor) -> None:
    loss.backward()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, wanted_leaf.grad, rtol=1e-10, atol=1e-14)
    assert leaf.grad.any()


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize(
    ("kind", "eps"), [("sigmoid", 0.0), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0), ("sigmoid_norm", 0.0)]
)
def test_a_batch_has_trls_loss_gradient_and_metrics(kind: str, eps: float, beta: float) -> None:
    mask, logps, ref = batch()
    leaf = logps.detach().clone().requires_grad_()
    wanted, metrics = trl_dpo(mask, leaf, ref, [kind], [1.0], beta, eps)
    losses, r_c, r_r, chosen, rejected = ours(mask, logps, ref, beta=beta, loss_type=kind, label_smoothing=eps)
    assert_same(losses.mean(), logps, wanted, leaf)
    found = {
        "rewards/chosen": r_c, "rewards/rejected": r_r, "rewards/accuracies": (r_c > r_r).double(),
        "rewards/margins": r_c - r_r, "logps/chosen": chosen, "logps/rejected": rejected,
    }  # fmt: skip
    for key, values in found.items():
        assert values.mean().item() == pytest.approx(metrics[key], rel=1e-6), key


@pytest.mark.parametrize("pair", range(5))
def test_cdpo_is_trls_aot_of_a_single_pair_and_trl_has_it_nowhere_else(pair: int) -> None:
    mask, logps, ref = (tensor[[pair, 5 + pair]].detach() for tensor in batch())
    mask[:, -1] = 1  # a row without a token has no gradient to compare
    leaf = logps.clone().requires_grad_()
    wanted, _ = trl_dpo(mask, leaf, ref, ["aot"], [1.0], 0.5, 0.2)
    losses, *_ = ours(mask, logps.requires_grad_(), ref, beta=0.5, label_smoothing=0.2)
    smoothed, plain = (trl_dpo(mask, leaf, ref, ["sigmoid"], [1.0], 0.5, eps)[0].item() for eps in (0.2, 0.0))
    assert smoothed == plain, "TRL has cDPO in sigmoid now: compare with that"
    assert_same(losses.mean(), logps, wanted, leaf)


def test_rpo_is_trls_sigmoid_and_sft_for_answers_of_one_length() -> None:
    mask, logps, ref = batch()
    mask[:, 1:] = torch.arange(1, 9) > 3
    leaf = logps.detach().clone().requires_grad_()
    wanted, _ = trl_dpo(mask, leaf, ref, ["sigmoid", "sft"], [1.0, 0.7], 0.1, 0.0)
    losses, _, _, chosen, _ = ours(mask, logps, ref)
    assert_same((losses + 0.7 * rpo_term(chosen, mask[:5].sum(dim=1))).mean(), logps, wanted, leaf)


def test_ipo_of_sums_is_trls_ipo_of_single_tokens() -> None:
    mask, logps, ref = batch()
    mask[:, 1:] = torch.arange(1, 9) == 3
    leaf = logps.detach().clone().requires_grad_()
    wanted, _ = trl_dpo(mask, leaf, ref, ["ipo"], [1.0], 0.1, 0.0)
    assert_same(ours(mask, logps, ref, loss_type="ipo_sum")[0].mean(), logps, wanted, leaf)


def test_orpo_has_trls_loss_gradient_and_odds() -> None:
    """TRL's logits in, its NLL over prompt and answer; ours from log-probabilities. A window of one batch."""
    B, T, V = 4, 7, 11
    ids = torch.randint(V, (2 * B, T))
    attention = (torch.arange(T) < torch.randint(4, T + 1, (2 * B, 1))).long()
    attention[0] = 1
    mask = attention * (torch.arange(T) >= 3)  # from the fourth token on, the answer; some have one token alone
    mask[1, 3:] = torch.arange(3, T) == 3
    leaves = [torch.randn(2 * B, T, V, dtype=torch.float64) for _ in range(1)]
    logits = leaves[0].clone().requires_grad_()
    trl_logits = leaves[0].clone().requires_grad_()

    def halves(tensor: Tensor, name: str) -> dict[str, Tensor]:
        return {f"chosen_{name}": tensor[:B], f"rejected_{name}": tensor[B:]}

    labels = torch.where(mask == 1, ids, -100)
    inputs = halves(ids, "input_ids") | halves(attention, "attention_mask") | halves(labels, "labels")
    trainer = SimpleNamespace(
        is_encoder_decoder=False, padding_value=0, accelerator=ACCELERATOR, aux_loss_enabled=False, beta=0.1
    )
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, name, getattr(ORPOTrainer, name))
    for name in ("concatenated_forward", "odds_ratio_loss"):
        setattr(trainer, name, getattr(ORPOTrainer, name).__get__(trainer))
    model = lambda *_, **__: SimpleNamespace(logits=trl_logits)  # noqa: E731
    wanted, metrics = ORPOTrainer.get_batch_loss_metrics(trainer, model, inputs)

    logps = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
    means = sequence_logps(logps, mask[:, 1:]) / mask.sum(dim=1)
    nll = -sequence_logps(logps[:B], attention[:B, 1:])
    loss, log_odds = orpo_loss(*means.chunk(2), nll, lambda_or=0.1, num_items=int(attention[:B, 1:].sum()))
    loss.backward()
    wanted.backward()
    # TRL computes its odds in float32
    eps = torch.finfo(torch.float32).eps
    assert loss.item() == pytest.approx(wanted.item(), rel=4 * eps)
    torch.testing.assert_close(logits.grad, trl_logits.grad, rtol=0, atol=4 * eps * logits.grad.abs().max().item())
    assert log_odds.mean().item() == pytest.approx(float(metrics["log_odds_chosen"]), rel=64 * eps)
    assert means.chunk(2)[0].mean().item() == pytest.approx(float(metrics["logps/chosen"]), rel=8 * eps)


STEPS, RATE = 5, 1e-3


class OnOurIds(DPOTrainer):
    """TRL's trainer, which takes the tokens as they are: its own learn the newline after ChatML's end token too."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def test_whole_runs_agree_with_trls_trainer(tmp_path: Path) -> None:
    """Full fine-tuning of the tiny model on the same ids: loss, gradient norm and rewards of every step.

    A window is the whole data set, in two micro-batches, so that the order of the pairs does not matter.
    """
    base = write_base(tmp_path / "base")
    pairs, _ = encoded(base)
    rows = [
        {"prompt_ids": pair.chosen.ids[: pair.prompt_length], "chosen_ids": learnt(pair.chosen, pair.prompt_length),
         "rejected_ids": learnt(pair.rejected, pair.prompt_length)}
        for pair in pairs
    ]  # fmt: skip
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=STEPS,
        learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1e9, logging_steps=1,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        optim="adamw_torch",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = OnOurIds(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )  # fmt: skip
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]

    config = OurConfig(
        data=str(write_rows(tmp_path / "pairs.jsonl", PAIRS[:8])), out=str(tmp_path / "ours"), model=str(base),
        method="full", batch_size=4, accumulation=2, max_steps=STEPS, learning_rate=RATE, schedule="constant",
        warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=0.0, samples=0, threads=1,
    )  # fmt: skip
    train(config, quiet=True)
    ours = read_metrics(tmp_path / "ours" / "metrics.jsonl")
    assert len(ours) == len(theirs) == STEPS
    assert ours[-1]["loss"] < 0.8 * ours[0]["loss"]
    for mine, trls in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies"):
            assert mine[key] == pytest.approx(trls[key], rel=1e-3, abs=1e-3), (mine["step"], key)


def learnt(side: Encoded, start: int) -> list[int]:
    """The answer's ids with its end token."""
    return [token for token, m in zip(side.ids[start:], side.completion_mask[start:], strict=True) if m]

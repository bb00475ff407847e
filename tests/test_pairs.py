"""trainers/pairs, reference, logprobs: no padding is computed, numbers go to their pairs, tables equal live ones."""

import math
import re
from pathlib import Path

import pytest
import torch

from lora import trainable_parameters
from models import Decoder
from tests.pair_rows import PAIRS, encoded, moved
from tests.small_base import write_base
from trainers.dpo_config import DPOConfig
from trainers.logprobs import per_token_logps, unpadded_logps
from trainers.orpo_config import ORPOConfig
from trainers.pairs import Totals, answer_logps, count_pairs, pair_batches
from trainers.prepare import prepare_model
from trainers.recipes import PreferenceHealth
from trainers.reference import compute_table, from_table, live_reference, read_tables, write_tables

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


def config_of(base: Path, **settings) -> DPOConfig:
    return DPOConfig(**{"data": "none", "out": "none", "model": str(base), "r": 4, **settings})


def test_rows_without_padding_give_the_numbers_and_gradients_of_padded_ones(base: Path) -> None:
    pairs, pad_id = encoded(base)
    (batch,) = pair_batches(pairs, range(8), 8, pad_id)
    rows = batch.rows
    assert (rows.segment_ids == 0).sum() > 20
    model = prepare_model(config_of(base, method="full"))
    found = []
    for logps_of in (per_token_logps, unpadded_logps):
        logps = logps_of(model, rows.input_ids, rows.segment_ids, rows.completion_mask)
        logps.square().sum().backward()
        found.append((logps.detach(), [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    (wanted, wanted_grads), (logps, grads) = found
    torch.testing.assert_close(logps, wanted, rtol=0, atol=64 * EPS * wanted.abs().max().item())
    assert torch.equal(logps == 0, rows.completion_mask[:, 1:] == 0)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert (grad - wanted_grad).norm() <= 64 * EPS * wanted_grad.norm()


def test_one_forward_sees_every_token_of_both_answers_and_no_padding(base: Path, monkeypatch) -> None:
    pairs, pad_id = encoded(base)
    (batch,) = pair_batches(pairs, [3, 1, 5], 3, pad_id)
    seen, forward = [], Decoder.forward

    def counting(self, input_ids, **more):
        seen.append(input_ids.shape)
        return forward(self, input_ids, **more)

    monkeypatch.setattr(Decoder, "forward", counting)
    logps = answer_logps(prepare_model(config_of(base)), batch.rows)
    chosen, rejected = ([getattr(pairs[i], side) for i in (3, 1, 5)] for side in ("chosen", "rejected"))
    assert seen == [(1, sum(len(row.ids) for row in [*chosen, *rejected]))]
    assert logps.lengths.tolist() == [row.n_learnt for row in [*chosen, *rejected]]
    counts = count_pairs([batch])
    assert counts == (3, seen[0][1], sum(row.n_learnt for row in [*chosen, *rejected]))
    assert torch.equal(logps.means, logps.sums / logps.lengths)


@pytest.mark.parametrize("masked", [slice(1, 2), slice(None)], ids=["one answer", "all"])
def test_an_answer_of_which_nothing_is_learnt_is_0_and_pulls_at_nothing(base: Path, masked: slice) -> None:
    """Its own row, that is: the others have the numbers and the gradients that they have without it."""
    pairs, pad_id = encoded(base, 2)
    (batch,) = pair_batches(pairs, range(2), 2, pad_id)
    model = prepare_model(config_of(base, method="full"))
    kept = [i for i in range(4) if i not in range(4)[masked]]
    mask = batch.rows.completion_mask.clone()
    mask[masked] = 0
    found = []
    for rows, which in ((batch.rows._replace(completion_mask=mask), range(4)), (batch.rows, kept)):
        logps = answer_logps(model, rows)
        (logps.means[list(which)].sum() + 0 * logps.sums.sum()).backward()
        found.append((logps, [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    (logps, grads), (whole, wanted) = found
    assert logps.sums[masked].tolist() == logps.lengths[masked].tolist() == [0] * (4 - len(kept))
    assert torch.equal(logps.means[kept], whole.means[kept])
    for grad, wanted_grad in zip(grads, wanted, strict=True):
        assert (grad - wanted_grad).norm() <= 64 * EPS * wanted_grad.norm()


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_reference_is_the_model_before_training_live_or_from_a_table(base: Path, method: str) -> None:
    """However far the policy has gone; a table says of each pair what a forward over any batch says."""
    pairs, pad_id = encoded(base)
    config = config_of(base, method=method)
    model = prepare_model(config)
    table = compute_table(model, pairs, 3, pad_id)
    moved(trainable_parameters(model))
    live = live_reference(config, model)
    (batch,) = pair_batches(pairs, [6, 0, 2, 5], 4, pad_id)
    logps = live(batch)
    assert not logps.requires_grad
    assert model.adapter_state.enabled if method != "full" else True
    torch.testing.assert_close(from_table(table)(batch), logps, rtol=16 * EPS, atol=0)
    policy = answer_logps(model, batch.rows).sums
    assert (policy - logps).abs().min() > 1e-3


def test_a_table_is_read_for_the_pairs_it_was_written_for_only(base: Path, tmp_path: Path) -> None:
    pairs, _ = encoded(base)
    path, sets = tmp_path / "reference.safetensors", {"train": pairs[:6], "eval": pairs[6:]}
    assert read_tables(path, sets) is None
    tables = {name: torch.rand(len(members), 2) for name, members in sets.items()}
    write_tables(path, tables, sets)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    found = read_tables(path, sets)
    assert found.keys() == tables.keys()
    assert all(torch.equal(found[name], tables[name]) for name in tables)
    for others in ({"train": pairs[:6], "eval": pairs[5:7]}, {"train": pairs}):
        with pytest.raises(ValueError, match=r"reference.safetensors is of other pairs than this run's: delete it"):
            read_tables(path, others)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"reference.safetensors cannot be read"):
        read_tables(path, sets)


def test_totals_are_means_over_all_pairs_of_a_window() -> None:
    totals = Totals()
    totals.add({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, 5.0])})
    totals.add({"a": torch.tensor([6.0])})
    assert totals.means(3) == {"a": 3.0, "b": pytest.approx(10 / 3)}


GOOD = {"logps/chosen": -40.0, "rewards/accuracies": 0.9, "rewards/margins": 1.0}


@pytest.mark.parametrize(
    ("now", "still_good", "message"),
    [
        ({"logps/chosen": -50.1}, {"logps/chosen": -49.9}, "chosen answers grow less likely (logps/chosen -40 at f"),
        ({"rewards/accuracies": 0.59}, {"rewards/accuracies": 0.61}, "pairs are told apart hardly better than by cha"),
        ({"rewards/margins": 10.1}, {"rewards/margins": 10.0}, "the margin is far beyond what is needed (rewards/mar"),
    ],
)  # fmt: skip
def test_a_run_says_once_what_its_numbers_mean(now: dict, still_good: dict, message: str) -> None:
    for later, expected in ((now, [message]), (still_good, [])):
        health = PreferenceHealth("dpo", [GOOD] * 5)
        said = [line for row in [GOOD] * 5 + [{**GOOD, **later}] * 40 for line in health.new_warnings(row)]
        assert [line[: len(message)] for line in said] == expected


def test_orpo_is_told_of_flags_that_it_has() -> None:
    """Its reward is λ times a mean: a margin of 10 says nothing there, and --beta and --rpo-alpha are DPO's."""
    health = PreferenceHealth("orpo", [GOOD] * 10)
    bad = {"logps/chosen": -60.0, "rewards/accuracies": 0.5, "rewards/margins": 20.0}
    said = [line for _ in range(10) for line in health.new_warnings(bad)]
    assert len(said) == 2
    flags = {flag for line in said for flag in re.findall(r"--([a-z-]+)", line)}
    assert flags == {"lambda-or", "learning-rate"}
    assert flags <= {name.replace("_", "-") for name in ORPOConfig.__dataclass_fields__}


def test_numbers_that_were_not_finite_warn_of_nothing() -> None:
    health = PreferenceHealth("dpo", [{**GOOD, "logps/chosen": None}] * 10)
    assert [health.new_warnings({**GOOD, "rewards/margins": math.nan}) for _ in range(10)] == [[]] * 10


def test_the_pairs_used_here_are_of_unequal_lengths() -> None:
    assert len({len(row["rejected"]) for row in PAIRS}) > 3

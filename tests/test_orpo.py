"""trainers/orpo: the loss of a real window against float64, accumulation, the run's folder, resume."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import qlora
from lora import disabled_adapters, trainable_parameters
from tests import reference, reference_preference
from tests.pair_rows import PAIRS, encoded, moved
from tests.small_base import write_base, write_rows
from trainers import orpo
from trainers.checkpoint import all_checkpoints
from trainers.metrics import read_metrics
from trainers.pairs import Totals, pair_batches
from trainers.prepare import frozen_base, prepare_model

EPS = torch.finfo(torch.float32).eps
NLL = ("answer", "all")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def config(base, tmp_path) -> orpo.ORPOConfig:
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    return orpo.ORPOConfig(
        data=str(data), out=str(tmp_path / "run"), model=str(base), max_steps=6, batch_size=2, accumulation=2, r=4,
        learning_rate=5e-3, dropout=0.1, samples=0, threads=1,
    )  # fmt: skip


def window(config, model, pairs, pad_id, size: int) -> tuple[float, list[torch.Tensor], dict[str, float]]:
    """Loss, gradients and means of all pairs as one window, `size` in a micro-batch."""
    batches = pair_batches(pairs, range(len(pairs)), size, pad_id)
    loss, totals, items = 0.0, Totals(), orpo.count_items(config, batches)
    share = partial(orpo.share_of_loss, config, model, totals=totals, num_items=items, num_pairs=len(pairs))
    for batch in batches:
        part = share(batch)
        part.backward()
        loss += part.item()
    grads = [p.grad.clone() for _, p in trainable_parameters(model)]
    model.zero_grad()
    return loss, grads, orpo.per_item(totals.means(len(pairs)), items / len(pairs))


@pytest.mark.parametrize("nll", NLL)
def test_a_windows_loss_and_scores_are_float64_loops_over_its_logits(base, config, nll):
    pairs, pad_id = encoded(base, 5)
    config = replace(config, method="lora", dropout=0.0, nll=nll, lambda_or=0.7)
    model = prepare_model(config)
    moved(trainable_parameters(model))
    loss, _, means = window(config, model, pairs, pad_id, 2)
    total, items, odds = 0.0, 0, 0.0
    for pair in pairs:
        mean = []
        for side in (pair.chosen, pair.rejected):
            logits = model(torch.tensor([side.ids]))[0].detach().double().tolist()
            logps = [reference.log_softmax(logits[t - 1])[side.ids[t]] for t in range(1, len(side.ids))]
            answer = [logp for logp, m in zip(logps, side.completion_mask[1:], strict=True) if m]
            mean.append(sum(answer) / len(answer))
            if side is pair.chosen:
                counted = answer if nll == "answer" else logps
                total, items = total - sum(counted), items + len(counted)
        odds += reference_preference.orpo_pair(*mean, config.lambda_or).loss / 5
    assert loss == pytest.approx(total / items + odds, rel=1e-5)
    assert means["nll_loss"] == pytest.approx(total / items, rel=1e-5)
    assert means["log_odds_ratio"] == pytest.approx(-odds / config.lambda_or, rel=1e-4)
    assert means["rewards/chosen"] == pytest.approx(config.lambda_or * means["logps/chosen"], rel=1e-5)


@pytest.mark.parametrize("nll", NLL)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_one_by_eight_equals_eight_by_one_in_loss_and_gradients(base, config, method, nll):
    """Tokens are counted over the window, and pairs too; a mean of means would differ by what is checked last."""
    pairs, pad_id = encoded(base)
    config = replace(config, method=method, dropout=0.0, nll=nll)
    model = prepare_model(config)
    moved(trainable_parameters(model))
    (loss_1, grads_1, means_1), (loss_8, grads_8, means_8) = (window(config, model, pairs, pad_id, n) for n in (1, 8))
    assert loss_1 == pytest.approx(loss_8, rel=16 * EPS)
    assert means_1 == pytest.approx(means_8, rel=1e-5, abs=1e-6)
    for a, b in zip(grads_1, grads_8, strict=True):
        assert (a - b).norm() <= 256 * EPS * b.norm()
    with torch.no_grad():
        alone = []
        for batch in pair_batches(pairs, range(8), 1, pad_id):
            n = {"num_items": orpo.count_items(config, [batch]), "num_pairs": 1}
            alone.append(float(orpo.share_of_loss(config, model, batch, totals=Totals(), **n)))
    assert abs(sum(alone) / 8 - loss_8) > 1e-4


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_run_leaves_its_folder_and_learns(config, method):
    config = replace(
        config, method=method, max_steps=12, eval_fraction=0.25, eval_every=6, samples=2, max_new_tokens=6, dropout=0.0,
        learning_rate=5e-3 if method != "full" else 1e-3,
    )  # fmt: skip
    trained = orpo.train(config, quiet=True)
    out = Path(config.out)
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[5]["eval_loss"] < rows[0]["loss"]
    last = rows[-1]
    assert last["eval_loss"] == pytest.approx(last["eval_nll_loss"] - 0.1 * last["eval_log_odds_ratio"], rel=1e-5)
    assert last["eval_rewards/accuracies"] == 1.0
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (out / "plots").iterdir()) == ["accuracy.png", "loss.png", "margin.png"]
    if method != "full":
        ids = torch.arange(20)[None]
        with disabled_adapters(trained.model):
            assert torch.equal(trained.model.eval()(ids), frozen_base(config)(ids)), "the base is as it was"


def test_a_run_cut_short_resumes_to_the_same_bytes(config, tmp_path):
    config = replace(config, save_every=2, eval_fraction=0.25)
    orpo.train(config, quiet=True)
    out, copy = Path(config.out), tmp_path / "copy"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "adapter")
    shutil.rmtree(all_checkpoints(copy / "checkpoints")[-1])
    orpo.train(replace(config, out=str(copy), resume=True), quiet=True)
    file = Path("adapter") / "adapter_model.safetensors"
    assert (out / file).read_bytes() == (copy / file).read_bytes()
    assert [row["loss"] for row in read_metrics(out / "metrics.jsonl")] == [
        row["loss"] for row in read_metrics(copy / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lambda-or", "-0.1"], "--lambda-or must not be negative, got -0.1"),
        (["--nll", "prompt"], "invalid choice 'prompt'"),
        (["--beta", "0.1"], "Unrecognized"),
    ],
)
def test_a_flag_outside_its_range_is_refused(base, tmp_path, capsys, flags, message):
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    asked = ["orpo", "--data", str(data), "--model", str(base), "--out", str(tmp_path / "run")]
    assert qlora.main([*asked, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

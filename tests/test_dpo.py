"""trainers/dpo: the loss of a real window against float64, ln 2 at first, accumulation, the run's folder, resume."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import qlora
from lora import disabled_adapters, load_adapter, trainable_parameters
from models import Decoder, load_model
from tests import reference, reference_preference
from tests.pair_rows import PAIRS, encoded, moved
from tests.small_base import write_base, write_rows
from trainers import dpo
from trainers.checkpoint import all_checkpoints
from trainers.metrics import read_metrics
from trainers.pairs import Totals, pair_batches
from trainers.prepare import frozen_base, prepare_model
from trainers.reference import live_reference

ROOT = Path(__file__).parent.parent
EPS = torch.finfo(torch.float32).eps
METHODS = ("full", "lora", "qlora")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def config(base, tmp_path) -> dpo.DPOConfig:
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    return dpo.DPOConfig(
        data=str(data), out=str(tmp_path / "run"), model=str(base), max_steps=6, batch_size=2, accumulation=2, r=4,
        learning_rate=5e-3, dropout=0.1, samples=0, threads=1,
    )  # fmt: skip


def window(config, model, pairs, pad_id, size: int) -> tuple[float, list[torch.Tensor], Totals]:
    """Loss, gradients and scores of all pairs as one window, `size` in a micro-batch."""
    loss, totals, reference_logps = 0.0, Totals(), live_reference(config, model)
    for batch in pair_batches(pairs, range(len(pairs)), size, pad_id):
        share = dpo.share_of_loss(config, model, reference_logps, batch, totals=totals, num_items=len(pairs))
        share.backward()
        loss += share.item()
    grads = [p.grad.clone() for _, p in trainable_parameters(model)]
    model.zero_grad()
    return loss, grads, totals


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_is_ln_2_with_a_gradient(base, config, method):
    pairs, pad_id = encoded(base)
    config = replace(config, method=method, dropout=0.0)
    loss, grads, totals = window(config, prepare_model(config), pairs, pad_id, 8)
    assert loss == pytest.approx(math.log(2), rel=16 * EPS)
    assert max(grad.abs().max() for grad in grads) > 1e-4
    means = totals.means(8)
    assert abs(means["rewards/margins"]) < 1e-4
    assert means["logps/chosen"] < 0


def answer_logp(model: Decoder, ids: list[int], mask: list[int]) -> float:
    """Σ log p of the answer's tokens, in float64 loops from the logits."""
    logits = model(torch.tensor([ids]))[0].double().tolist()
    return sum(reference.log_softmax(logits[t - 1])[ids[t]] for t in range(1, len(ids)) if mask[t])


@pytest.mark.parametrize(
    "settings",
    [{}, {"label_smoothing": 0.2, "beta": 0.5}, {"loss_type": "ipo"}, {"rpo_alpha": 0.7}],
    ids=["dpo", "cdpo", "ipo", "rpo"],
)
@torch.no_grad()
def test_a_windows_loss_and_scores_are_float64_loops_over_its_logits(base, config, settings):
    pairs, pad_id = encoded(base, 5)
    config = replace(config, method="lora", dropout=0.0, **settings)
    model = prepare_model(config)
    moved(trainable_parameters(model))
    batches = pair_batches(pairs, range(5), 2, pad_id)
    totals, live = Totals(), live_reference(config, model)
    share = partial(dpo.share_of_loss, config, model, live, totals=totals, num_items=5)
    loss = sum(share(batch).item() for batch in batches)
    wanted, margins, nll = 0.0, 0.0, 0.0
    for pair in pairs:
        sides = [(side.ids, side.completion_mask) for side in (pair.chosen, pair.rejected)]
        policy = tuple(answer_logp(model, *side) for side in sides)
        with disabled_adapters(model):
            ref = tuple(answer_logp(model, *side) for side in sides)
        lengths = (pair.chosen.n_learnt, pair.rejected.n_learnt)
        kind, eps = config.loss_type, config.label_smoothing
        wanted += reference_preference.dpo_pair(policy, ref, lengths, config.beta, kind, eps).loss / 5
        nll -= policy[0] / lengths[0] / 5
        margins += config.beta * (policy[0] - ref[0] - policy[1] + ref[1]) / 5
    means = totals.means(5)
    assert loss == pytest.approx(wanted + config.rpo_alpha * nll, rel=1e-4)
    assert means["rewards/margins"] == pytest.approx(margins, rel=1e-3, abs=1e-4)
    assert means["rewards/margins"] == pytest.approx(means["rewards/chosen"] - means["rewards/rejected"], rel=1e-4)
    if config.rpo_alpha:
        assert means["nll_loss"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_by_eight_equals_eight_by_one_in_loss_and_gradients(base, config, method):
    """Pairs of unequal length; with the RPO term, whose means are over each answer's tokens."""
    pairs, pad_id = encoded(base)
    config = replace(config, method=method, dropout=0.0, rpo_alpha=0.5)
    model = prepare_model(config)
    moved(trainable_parameters(model))
    (loss_1, grads_1, totals_1), (loss_8, grads_8, totals_8) = (window(config, model, pairs, pad_id, n) for n in (1, 8))
    assert loss_1 == pytest.approx(loss_8, rel=16 * EPS)
    assert totals_1.means(8) == pytest.approx(totals_8.means(8), rel=1e-5, abs=1e-5)
    for a, b in zip(grads_1, grads_8, strict=True):
        assert (a - b).norm() <= 256 * EPS * b.norm()


@pytest.mark.parametrize("precompute_ref", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_its_folder_and_learns(config, base, method, precompute_ref):
    config = replace(
        config, method=method, precompute_ref=precompute_ref, max_steps=12, eval_fraction=0.25, eval_every=6, samples=2,
        save_every=4, learning_rate=5e-3 if method != "full" else 1e-3, max_new_tokens=6, dropout=0.0,
    )  # fmt: skip
    trained = dpo.train(config, quiet=True)
    out = Path(config.out)
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=64 * EPS)
    assert rows[0]["pairs"] == 4
    assert rows[-1]["eval_loss"] < rows[5]["eval_loss"] < rows[0]["loss"]
    assert rows[-1]["eval_rewards/accuracies"] == 1.0
    assert trained.result.eval_loss == rows[-1]["eval_loss"]
    assert sorted(path.name for path in (out / "plots").iterdir()) == ["accuracy.png", "loss.png", "margin.png"]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [set(sample) for sample in samples] == [{"prompt", "before", "completion", "chosen", "rejected"}] * 2
    assert (out / "reference.safetensors").exists() == precompute_ref
    ids = torch.arange(20)[None]
    if method == "full":
        reloaded = load_model(out / "model")
    else:
        quantize = "nf4" if method == "qlora" else None
        reloaded = load_adapter(load_model(base, dtype=torch.float32, quantize=quantize), out / "adapter")
        with disabled_adapters(trained.model):
            assert torch.equal(trained.model.eval()(ids), frozen_base(config)(ids)), "the base is as it was"
    assert torch.equal(reloaded(ids), trained.model.eval()(ids))


def result_bytes(out: Path | str) -> bytes:
    (file,) = [*Path(out).glob("model/*.safetensors"), *Path(out).glob("adapter/*.safetensors")]
    return file.read_bytes()


def test_a_killed_run_resumes_to_the_same_bytes(config, tmp_path):
    """SIGKILL in the middle, dropout on."""
    config = replace(config, max_steps=24, save_every=2)
    whole = replace(config, out=str(tmp_path / "whole"))
    dpo.train(whole, quiet=True)
    out = Path(config.out)
    script = (
        "import json, sys; from trainers import dpo; dpo.train(dpo.DPOConfig(**json.loads(sys.argv[1])), quiet=True)"
    )
    arguments = [sys.executable, "-c", script, json.dumps(config.__dict__)]
    process = subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(list((out / "checkpoints").glob("step-*"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert not (out / "adapter").exists()
    dpo.train(replace(config, resume=True), quiet=True)
    assert result_bytes(out) == result_bytes(whole.out)
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 25))


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_resumed_run_takes_its_reference_from_the_folder(config, method, monkeypatch):
    """Computed once: neither the policy, which has moved, nor a second model is asked again."""
    config = replace(config, method=method, precompute_ref=True, save_every=3, eval_fraction=0.25)
    first = dpo.train(config, quiet=True)
    kept = result_bytes(config.out)
    shutil.rmtree(Path(config.out) / ("model" if method == "full" else "adapter"))
    shutil.rmtree(all_checkpoints(Path(config.out) / "checkpoints")[-1])
    monkeypatch.setattr(dpo, "compute_table", None)
    again = dpo.train(replace(config, resume=True), quiet=True)
    assert result_bytes(config.out) == kept
    assert again.result.eval_loss == first.result.eval_loss
    finished = dpo.train(replace(config, resume=True), quiet=True)
    assert finished.result.loss == first.result.loss


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss-type", "hinge", "--label-smoothing", "0.1"], "label_smoothing is for loss_type sigmoid and robust"),
        (["--beta", "0"], "beta must be above 0, got 0.0"),
        (["--init", "pissa"], "--init pissa changes the base, so that the adapter off is no reference"),
        (["--rpo-alpha", "-1"], "--rpo-alpha must not be negative, got -1.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--shape", "alpaca"], "--shape must be preference for dpo, got 'alpaca'"),
        (["--template", "{prompt} => {chosen}"], "--template does not go with --shape preference"),
        (["--data", "OTHER"], "row 1: missing 'chosen'; found completion, prompt"),
        (["--data", "EMPTY"], "row 2: rejected: the answer (message 2) is empty"),
        (["--data", "TIES"], "nothing to learn: of 1 rows 1 are ties"),
        (["--max-seq-length", "9"], "nothing to learn: of 24 rows 0 are ties, and 24 have an answer that lies beyond"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_no_folder(base, tmp_path, capsys, flags, message):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    files = {
        "GOOD": PAIRS,
        "OTHER": [{"prompt": "a", "completion": "b"}],
        "EMPTY": [good, {**good, "rejected": " "}],
        "TIES": [{**good, "rejected": "b"}],
    }
    paths = {name: str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items()}
    out = tmp_path / "run"
    asked = ["dpo", "--data", paths["GOOD"], "--model", str(base), "--out", str(out)]
    assert qlora.main([*asked, *(paths.get(flag, flag) for flag in flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()


def test_a_stop_names_the_command_that_goes_on(config, monkeypatch, capsys):
    monkeypatch.setattr(qlora, "parse", lambda *_: config)
    monkeypatch.setattr(dpo, "evaluate_pairs", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {"eval_loss": 0.0})
    monkeypatch.setattr(dpo, "said_of", lambda _: "")
    config = replace(config, eval_fraction=0.25, eval_every=2)
    assert qlora.main(["dpo"]) == 130
    assert "which is saved; go on with: qlora dpo --config" in capsys.readouterr().err

"""experiments/: formats that are written there alone, the bits of the paper, pages that say what their rows say."""

import importlib
import math
from pathlib import Path

import pytest
import torch

import qlora
from commands.experiment import names
from experiments import finetuning, lora_vs_full, memory_saving, pages, rank, targets
from experiments.bits import bits_per_weight
from experiments.finetuning import Arm, at_best_rate, reported, summary, trained_by
from experiments.formats import FORMATS, affine_int4
from experiments.merge_drift import cycles, delta_of
from experiments.small_model import CONFIG, trained, untrained
from experiments.text import perplexity, reference, row_losses, rows_of, source
from kernels import dequantize, quantize
from models import Decoder


def test_affine_int4_by_hand() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 32)
    found = affine_int4(weight, 32)
    for row, back in zip(weight.tolist(), found.weight.tolist(), strict=True):
        low = float(torch.tensor(min(row)).half())
        scale = float(torch.tensor((max(row) - min(row)) / 15).half())
        for w, b in zip(row, back, strict=True):
            q = min(15, max(0, round((w - low) / scale)))
            assert b == pytest.approx(q * scale + low, abs=1e-6)
    assert found.bits == 4 + (16 + 16) / 32
    assert torch.equal(affine_int4(found.weight, 32).weight, found.weight), "what lies on its levels stays"


def test_the_papers_bits() -> None:
    plain, double = bits_per_weight(64, double_quant=False), bits_per_weight(64, double_quant=True)
    assert round(plain - double, 3) == 0.373
    assert round((plain - double) / 8 * 65, 1) == 3.0  # GB for 65 billion weights
    held = FORMATS["NF4, double"](torch.randn(256, 256), 64)
    assert held.bits == pytest.approx(double + 32 / 256**2)  # and the offset, once
    assert FORMATS["NF3"](torch.randn(256, 256), 64).bits == 3.5


def test_a_merge_of_nothing_moves_nothing_and_a_large_one_arrives() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    delta = delta_of(weight, 0.01)
    assert float(delta.norm() / weight.norm()) == pytest.approx(0.01, rel=1e-4)
    errors = [next(cycles(quantize(weight), delta_of(weight, share)))[0] for share in (0.01, 1.0, 100.0)]
    assert errors[0] > errors[1] > errors[2]
    q = quantize(weight)
    # against a merge by hand
    before = dequantize(q)
    merged = dequantize(quantize(before + delta))
    by_hand = float((merged - before - delta).norm() / delta.norm())
    assert next(cycles(q, delta))[0] == pytest.approx(by_hand, rel=1e-4)


def test_text_and_a_small_model_that_learns() -> None:
    text = reference()
    assert len(text) > 300_000
    rows = rows_of(list(range(10)), 3)
    assert rows == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert len(rows_of(list(range(1000)), 10, 7)) == 7
    model = trained(steps=3)
    held_out = rows_of(text[-4096:].encode(), 64)
    assert perplexity(model, held_out) < 256  # three steps take it below chance
    ids = torch.tensor(held_out)
    with torch.no_grad():
        logps = torch.log_softmax(model(ids).double(), -1)[:, :-1].gather(-1, ids[:, 1:, None])
    assert perplexity(model, held_out) == pytest.approx(float(torch.exp(-logps.mean())), rel=1e-5)


def test_formats_of_magnitudes_by_hand() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 32)
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    levels = [sign * m / 6 for m in magnitudes for sign in (1, -1)]
    for row, back in zip(weight.tolist(), FORMATS["FP4 E2M1"](weight, 32).weight.tolist(), strict=True):
        absmax = max(abs(w) for w in row)
        wanted = [min(levels, key=lambda level, w=w: abs(level - w / absmax)) * absmax for w in row]
        assert back == pytest.approx(wanted, abs=1e-6)


def test_row_losses_are_the_rows_and_modules_lie_on_one_side() -> None:
    model = untrained()
    rows = rows_of(source(finetuning.TEST)[:4096].encode(), 64, 6)
    each = [math.log(perplexity(model, [row])) for row in rows]
    assert row_losses(model, rows).tolist() == pytest.approx(each, rel=1e-6)
    sides = (finetuning.TRAIN, finetuning.DEV, finetuning.TEST)
    assert len(set().union(*sides)) == sum(map(len, sides))


def test_arms_of_equal_size() -> None:
    base = Decoder(CONFIG)
    sizes = {arm.name: trained_by(base, arm) for arm in targets.ARMS}
    assert sizes["all linear"] == sizes["attention"] == sizes["query and value"] == 630_784
    assert sizes["MLP"] == pytest.approx(630_784, rel=0.005)
    # r · (in + out) of the seven layers, by hand
    assert trained_by(base, rank.ARMS[0]) == 4 * (4 * 512 + 3 * (256 + 704))
    assert trained_by(base, lora_vs_full.ARMS[0]) == sum(p.numel() for p in base.parameters())


@pytest.mark.parametrize(
    ("best", "tried"), [(2, [1, 2, 3, 4]), (3, [2, 3, 4]), (0, [0, 1, 2, 3, 4]), (6, [2, 3, 4, 5, 6])]
)
def test_each_arm_walks_to_its_best_rate(best: int, tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    task = finetuning.Task(untrained(), [], [], [], [])

    def measured(of: finetuning.Task, arm: Arm, rate: float, seed: int) -> dict[str, object]:
        return {"dev": abs(of.rates.index(rate) - best), "rate": rate, "seed": seed, "arm": arm.name}

    monkeypatch.setattr(finetuning, "measured", measured)
    rows = at_best_rate(task, Arm("any"))
    assert [task.rates.index(row["rate"]) for row in rows] == [*tried, best, best]
    assert [row["seed"] for row in rows] == [1] * len(tried) + [2, 3]
    as_read = [{field: str(value) for field, value in row.items()} for row in rows]
    assert list(reported(as_read, "any")) == ["1", "2", "3"]
    assert len(at_best_rate(task, Arm("any"), every_rate=True)) == 3 * len(tried)
    assert {row["rate"] for row in reported(as_read, "any").values()} == {str(task.rates[best])}


def test_a_run_that_diverges_has_an_infinite_loss_and_no_run_moves_the_base() -> None:
    task = finetuning.task(quick=True)
    before = {name: p.clone() for name, p in task.base.named_parameters()}
    assert finetuning.measured(task, Arm("any", "full"), math.inf, seed=1)["dev"] == math.inf
    first, again, other = (finetuning.measured(task, Arm("any", "qlora"), 1e-2, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert all(torch.equal(p, before[name]) for name, p in task.base.named_parameters())


def test_the_summary_takes_differences_seed_by_seed() -> None:
    losses = {"base": {"0": 3.0}, "a": {"1": 1.0, "2": 2.0, "3": 3.0}, "b": {"1": 1.5, "2": 2.5, "3": 3.8}}
    rows = [
        {"arm": arm, "method": "none" if arm == "base" else "lora", "trained": "1000", "rate": "0.01", "seed": seed}
        | {"dev": "1.0", "test": str(loss), "old text": "1.0"}
        for arm, of in losses.items()
        for seed, loss in of.items()
    ]
    base, a, b = summary(rows, "a")
    assert (base["test loss"], base["minus a"]) == ("3.0000", "")
    assert (a["test loss"], a["minus a"], a["trained"]) == ("2.0000 ± 1.0000", "+0.0000 ± 0.0000", "1,000")
    assert b["minus a"] == "+0.6000 ± 0.1732"  # of 0.5, 0.5, 0.8
    assert (a["gain"], b["gain"]) == ("100%", "40%")  # 3 to 2, 3 to 2.6


def test_savings_are_planned_one_on_top_of_the_other() -> None:
    rows = {
        model: [row for row in pages.read("memory_saving") if row["model"] == model]
        for model in ("small", memory_saving.LARGE)
    }
    for row in rows["small"]:
        assert int(row["planned"]) == pytest.approx(int(row["measured"]), rel=0.1), row["saving"]
    for of in rows.values():
        assert [row["saving"] for row in of] == [saving.name for saving in memory_saving.SAVINGS]
        for row in of:
            assert int(row["planned"]) == sum(int(row[group]) for group in memory_saving.GROUPS)


@pytest.mark.parametrize("name", names())
def test_every_experiment_runs_in_a_tiny_setting(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"experiments.{name}")
    page = (pages.PAGES / f"{name}.csv").read_bytes()
    module.main(["--quick"])
    found, committed = pages.read(name, pages.TRIALS), pages.read(name)
    assert found
    assert list(found[0]) == list(committed[0])
    assert f"{next(iter(found[0].values()))}" in capsys.readouterr().out
    assert (pages.TRIALS / f"{name}.png").is_file() == hasattr(module, "draw")
    assert (pages.PAGES / f"{name}.csv").read_bytes() == page


@pytest.mark.parametrize("name", names())
def test_every_page_shows_its_rows_and_names_its_command(name: str) -> None:
    tables = getattr(importlib.import_module(f"experiments.{name}"), "tables", None)
    page = (pages.PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert f"`qlora experiment {name}`" in page
    assert pages.with_tables(page, pages.read(name), tables) == page, f"qlora experiment {name} rewrites it"
    assert f"[{name}]({name}.md)" in (pages.PAGES / "README.md").read_text(encoding="utf-8")
    assert (pages.PAGES / f"{name}.png").is_file() == (f"({name}.png)" in page)


def test_publish_replaces_rows_of_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGES", tmp_path)
    (tmp_path / "x.md").write_text("# X\n\n<!-- table -->\n<!-- end of table -->\n")
    pages.publish("x", [{"kind": "a", "n": 1}, {"kind": "b", "n": 2}], key="kind")
    pages.publish("x", [{"kind": "a", "n": 3}], key="kind", draw=lambda axes, rows: axes[0].plot([1]))
    assert [(row["kind"], row["n"]) for row in pages.read("x")] == [("b", "2"), ("a", "3")]
    assert "| a | 3 |" in (tmp_path / "x.md").read_text()
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    pages.publish("x", [{"kind": "a", "m": 4}], key="kind")
    assert [(row["kind"], row["m"]) for row in pages.read("x")] == [("a", "4")]  # what had other columns is gone
    with pytest.raises(ValueError, match=r"must have a place for each of its tables \[''\], found \[\]"):
        pages.with_tables("# no place", pages.read("x"))


def test_a_page_with_two_tables_says_once_what_they_were_measured_on() -> None:
    page = "<!-- table: a b -->\nold\n<!-- end of table -->\nwords\n<!-- table: c -->\n<!-- end of table -->\n"
    rows = [dict.fromkeys(pages.ABOUT, "x") | {"n": "1"}]
    filled = pages.with_tables(page, rows, lambda rows: {"c": [{"m": 2}], "a b": [{"n": rows[0]["n"]}]})
    first, second = filled.split("words")
    assert "| n |\n|---|\n| 1 |" in first
    assert "old" not in first
    assert "Measured" not in first
    assert "| m |\n|---|\n| 2 |" in second
    assert "Measured on: commit x" in second


def test_an_unknown_experiment_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert qlora.main(["experiment", "nothing"]) == 2
    assert f"no experiment 'nothing': there are {', '.join(names())}" in capsys.readouterr().err
    assert names() == ["bits", "formats", "lora_vs_full", "memory_saving", "merge_drift", "rank", "targets"]

"""experiments/: formats that are written there alone, the bits of the paper, pages that say what their rows say."""

from pathlib import Path

import pytest
import torch

import qlora
from commands.experiment import names
from experiments import pages
from experiments.bits import bits_per_weight
from experiments.formats import FORMATS, affine_int4
from experiments.merge_drift import cycles, delta_of
from experiments.small_model import trained
from experiments.text import perplexity, reference, rows_of
from kernels import dequantize, quantize


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


@pytest.mark.parametrize("name", names())
def test_every_page_shows_its_rows_and_names_its_command(name: str) -> None:
    page = (pages.PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert f"`qlora experiment {name}`" in page
    assert pages.with_table(page, pages.read(name)) == page, f"qlora experiment {name} rewrites it"


def test_publish_replaces_rows_of_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGES", tmp_path)
    (tmp_path / "x.md").write_text("# X\n\n<!-- table -->\n<!-- end of table -->\n")
    pages.publish("x", [{"kind": "a", "n": 1}, {"kind": "b", "n": 2}], key="kind")
    pages.publish("x", [{"kind": "a", "n": 3}], key="kind", draw=lambda axes, rows: axes[0].plot([1]), panels=1)
    assert [(row["kind"], row["n"]) for row in pages.read("x")] == [("b", "2"), ("a", "3")]
    assert "| a | 3 |" in (tmp_path / "x.md").read_text()
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="must have one place for its table, found 0"):
        pages.with_table("# no place", pages.read("x"))


def test_an_unknown_experiment_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert qlora.main(["experiment", "nothing"]) == 2
    assert "no experiment 'nothing': there are bits, formats, merge_drift" in capsys.readouterr().err

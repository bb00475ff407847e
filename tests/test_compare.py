"""models/compare.py against its definition in float64 over whole logits, with chunks, adapters and a 4-bit head."""

from __future__ import annotations

import pytest
import torch

import models.compare
from lora import LoRAConfig, add_adapter, disabled_adapters, merge_adapter, quantize_model
from models import Decoder
from models.compare import compare, outputs
from tests.small_llama import small_decoder

ROWS = [[1, 2, 3, 4, 5], [], [95, 0], [7]]


@torch.no_grad()
def logits_of(model: Decoder) -> torch.Tensor:
    return torch.cat([model(torch.tensor([row]))[0] for row in ROWS if row]).double()


def adapted(**changes: object) -> Decoder:
    """A model with an adapter on every linear layer, its head too, that changes something."""
    model = add_adapter(small_decoder(**changes), LoRAConfig(r=2, target_modules=r".*(_proj|lm_head)"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model  # type: ignore[return-value]


@pytest.mark.parametrize("chunk", [1, 200, 1 << 22])
def test_kl_and_the_largest_change_are_those_of_whole_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.compare, "CHUNK", chunk)
    first, second = small_decoder(), small_decoder()
    p, q = logits_of(first), logits_of(second)
    wanted = torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)
    found = compare(outputs(first, ROWS), outputs(second, ROWS))
    # the logits of a chunk are another product of the same numbers: fp32's rounding of each
    assert found.kl == pytest.approx(wanted.item(), rel=1e-5)
    assert found.largest_logit_change == pytest.approx((p - q).abs().max().item(), rel=1e-5)


def test_a_model_is_at_no_distance_from_itself() -> None:
    model = small_decoder()
    assert compare(outputs(model, ROWS), outputs(model, ROWS)) == (0.0, 0.0)


@pytest.mark.parametrize("four_bits", [False, True])
def test_outputs_stay_what_they_were_when_the_model_changes(four_bits: bool) -> None:
    """With the adapter on, off, and merged away: each is what the model said at the time."""
    model = quantize_model(adapted(), skip=()) if four_bits else adapted()
    on, logits_on = outputs(model, ROWS), logits_of(model)  # type: ignore[arg-type]
    with disabled_adapters(model):
        off, logits_off = outputs(model, ROWS), logits_of(model)  # type: ignore[arg-type]
    merge_adapter(model, dtype=torch.float64)
    wanted = torch.nn.functional.kl_div(
        logits_off.log_softmax(1), logits_on.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert compare(on, off).kl == pytest.approx(wanted.item(), rel=1e-5)
    assert compare(on, off).largest_logit_change == pytest.approx((logits_on - logits_off).abs().max().item(), rel=1e-5)


def test_what_cannot_be_compared() -> None:
    model = small_decoder()
    for rows, message in [
        ([[96]], "ids below 96, the model's vocabulary, found 96"),
        ([[]], "found -1"),
        ([], "found"),
    ]:
        with pytest.raises(ValueError, match=message):
            outputs(model, rows)
    whole = outputs(model, ROWS)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="their logits are NaN or infinite"):
        compare(whole, outputs(model, ROWS))

"""models/decoder.py: norms against float64 loops; packed documents equal separate ones, checkpointing changes no
gradient, precision is explicit, impossible settings are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from lora import LoRAConfig, add_adapter, disabled_adapters, quantize_model, set_adapter, trainable_parameters
from models import Decoder, load_model, save_model
from models.decoder import RMSNorm, document_positions
from tests.small_llama import EVERY, FAMILIES, small_config, small_decoder

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(7, 1e-3)
    torch.nn.init.normal_(norm.weight)
    x = (3 * torch.randn(2, 4, 7)).to(dtype)
    for row, out in zip(x.double().view(-1, 7).tolist(), norm(x).double().view(-1, 7).tolist(), strict=True):
        scale = 1 / math.sqrt(math.fsum(v * v for v in row) / 7 + 1e-3)
        wanted = [v * scale * g for v, g in zip(row, norm.weight.tolist(), strict=True)]
        assert out == pytest.approx(wanted, rel=torch.finfo(dtype).eps, abs=1e-6)
    assert norm(x).dtype == dtype


def test_positions_count_from_zero_in_every_document() -> None:
    segments = torch.tensor([[0, 0, 5, 5, 5, 2, 2, 0]])
    assert document_positions(segments, segments)[0].tolist() == [0, 1, 0, 1, 2, 0, 1, 0]
    assert document_positions(segments, None).tolist() == [list(range(8))]


def loss_of(model: Decoder, ids: Tensor, segments: Tensor | None = None) -> Tensor:
    """Sum of next-token losses inside documents."""
    logits = model(ids, segment_ids=segments)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    if segments is None:
        return losses.sum()
    return losses[((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)).flatten()].sum()


@pytest.mark.parametrize("setting", ["grouped", "llama3 rope", *FAMILIES])
def test_packed_documents_equal_separate_ones(setting: str) -> None:
    model = small_decoder(**EVERY[setting])
    documents = [torch.randint(0, 96, (1, n)) for n in (7, 12, 5)]
    packed = torch.cat([*documents, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    segments = torch.tensor([[1] * 7 + [2] * 12 + [3] * 5 + [0] * 3])
    loss_of(model, packed, segments).backward()
    together = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    sum(loss_of(model, document) for document in documents).backward()  # type: ignore[union-attr]
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        if name.endswith("k_proj.bias") or scale < 1e-6 * largest:
            scale = largest  # a gradient of 0: softmax ignores what all keys have in common, and a window of one all
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-4 * scale)


def gradients(model: Decoder, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().backward()
    return {name: p.grad.clone() for name, p in trainable_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("kind", ["full", "lora", "qlora", "lora with dropout", "packed"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    """To the bit, dropout's random numbers included; and it reaches every adapter."""
    model = small_decoder()
    if kind == "qlora":
        quantize_model(model)
    if "lora" in kind:
        add_adapter(model, LoRAConfig(r=4, dropout=0.3 if "dropout" in kind else 0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model.train()
    ids = torch.randint(0, 96, (2, 16))
    segments = torch.tensor([[1] * 9 + [2] * 7, [1] * 12 + [0] * 4]) if kind == "packed" else None

    def run() -> Tensor:
        torch.manual_seed(5)
        return loss_of(model, ids, segments)

    plain = gradients(model, run)
    model.gradient_checkpointing = True
    checkpointed = gradients(model, run)
    assert plain.keys() == checkpointed.keys() == {name for name, _ in trainable_parameters(model)}
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name
        assert gradient.abs().max() > 0, name


def test_checkpointing_runs_each_layer_again_and_only_where_a_gradient_is_wanted() -> None:
    model = small_decoder()
    calls: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.randint(0, 96, (1, 8))
    model.gradient_checkpointing = True
    loss_of(model, ids).backward()
    assert len(calls) == 4
    with torch.no_grad():
        model(ids)
    assert len(calls) == 6


def test_recomputation_uses_the_adapters_and_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward with adapter `one`, backward after a switch to none: the gradient is that of `one`."""
    model = small_decoder()
    for name in ("one", "two"):
        add_adapter(model, LoRAConfig(r=4), name)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    set_adapter(model, "one")
    ids = torch.randint(0, 96, (1, 12))
    with kernels.use_backend("reference"):
        plain = gradients(model, lambda: loss_of(model, ids))
    model.gradient_checkpointing = True
    asked: list[str] = []
    matmul = kernels.lora_matmul

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(kernels.dispatch.asked_backend())
        return matmul(*args, **kwargs)

    monkeypatch.setattr(kernels, "lora_matmul", spy)
    model.zero_grad()
    with kernels.use_backend("reference"):
        loss = loss_of(model, ids)
    with disabled_adapters(model):
        loss.backward()
    assert set(asked) == {"reference"}
    for name, gradient in plain.items():
        assert torch.equal(gradient, model.get_parameter(name).grad), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["lean", "checkpointing"])
def test_backward_uses_the_norms_of_the_forward(checkpointing: bool) -> None:
    """Norms that an adapter has trained whole are computed again in backward, though it is off by then."""
    model = small_decoder()
    add_adapter(model, LoRAConfig(r=4, modules_to_save=["layernorm"]))
    for name, parameter in trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=1.0 if "layernorm" in name else 0.1)
    ids = torch.randint(0, 96, (1, 12))
    wanted = gradients(model, lambda: loss_of(model, ids))
    model.gradient_checkpointing = checkpointing
    model.zero_grad()
    loss = loss_of(model, ids)
    with disabled_adapters(model):
        loss.backward()
    assert len(wanted) == len(trainable_parameters(model))
    for name, gradient in wanted.items():
        assert torch.equal(gradient, model.get_parameter(name).grad), name


@torch.no_grad()
@pytest.mark.parametrize("setting", ["mistral", "qwen2, last layers windowed", "qwen3, biases and a window", "smollm3"])
def test_a_family_loads_in_4_bits_and_wears_an_adapter(setting: str, tmp_path: Path) -> None:
    """Its biases and norms stay dense; a new adapter changes nothing, and every linear layer but the head has one."""
    model = small_decoder(**FAMILIES[setting])
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m", quantize="nf4")
    ids = torch.randint(0, 96, (1, 20))
    logits = quantize_model(model)(ids)
    assert torch.equal(loaded(ids), logits)
    add_adapter(loaded, LoRAConfig(r=2))
    assert len(trainable_parameters(loaded)) == 2 * 7 * model.config.num_hidden_layers
    assert torch.equal(loaded(ids), logits)


def test_compute_dtype_runs_fp32_weights_in_bf16() -> None:
    model = small_decoder()
    assert model.compute_dtype == torch.float32
    ids = torch.randint(0, 96, (2, 11))
    exact = model(ids, return_hidden=True)
    model.compute_dtype = torch.bfloat16
    hidden = model(ids, return_hidden=True)
    assert hidden.dtype == torch.bfloat16
    assert model(ids).dtype == torch.float32
    loss_of(model, ids).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    low = small_decoder()
    low.load_state_dict(model.state_dict())
    low.bfloat16()
    assert (hidden - exact).norm() <= 2 * (low(ids, return_hidden=True) - exact).norm()
    assert torch.equal(low._frequencies, model._frequencies)
    assert low._frequencies.dtype == torch.float32


@pytest.mark.parametrize("setting", ["grouped", "tied"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.filterwarnings("ignore:.*share one weight in this model")
def test_the_head_in_a_fused_loss_equals_the_logits(setting: str, adapted: bool) -> None:
    model = small_decoder(**EVERY[setting])
    if adapted:
        add_adapter(model, LoRAConfig(r=4, target_modules=["lm_head", "q_proj"]))
        torch.nn.init.normal_(model.lm_head.lora_B["default"])  # type: ignore[operator, index]
    ids, targets = torch.randint(0, 96, (2, 9)), torch.randint(0, 96, (18,))
    hidden = model(ids, return_hidden=True).view(18, -1)
    fused = kernels.linear_cross_entropy(hidden, model.head(), targets)
    torch.testing.assert_close(fused, F.cross_entropy(model(ids).view(18, -1), targets, reduction="none"))


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = small_decoder(tie_word_embeddings=True), small_decoder()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 7}, "head_dim must be even"),
        (
            {"architecture": "GemmaForCausalLM"},
            "GemmaForCausalLM is not supported; supported: Llama",
        ),
        ({"windows": (5, 5)}, r"a LlamaForCausalLM cannot have windows=\(5, 5\)"),
        ({"qk_norm": True}, "a LlamaForCausalLM cannot have qk_norm=True"),
        ({"rope_layers": (True, False)}, "a LlamaForCausalLM cannot have rope_layers"),
        ({**FAMILIES["mistral"], "windows": (5, None)}, r"a MistralForCausalLM cannot have windows=\(5, None\)"),
        ({**FAMILIES["mistral"], "windows": (5,)}, "windows must have one entry for each of the 2 layers"),
        ({**FAMILIES["mistral"], "windows": (0, 0)}, "windows must be positive, got 0"),
        ({**FAMILIES["mistral"], "attention_bias": True}, "a MistralForCausalLM cannot have attention_bias=True"),
        ({**FAMILIES["qwen2"], "qkv_bias": False}, "a Qwen2ForCausalLM cannot have qkv_bias=False"),
        ({**FAMILIES["qwen2"], "mlp_bias": True}, "a Qwen2ForCausalLM cannot have mlp_bias=True"),
        ({**FAMILIES["qwen3"], "windows": (5, 6)}, r"a Qwen3ForCausalLM cannot have windows=\(5, 6\)"),
    ],
    ids=str,
)
def test_a_decoder_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    """Sizes that contradict each other, and settings that its family could not write into a config.json."""
    with pytest.raises(ValueError, match=message):
        Decoder(small_config(**changes))

"""DoRA, PiSSA, OLoRA, LoftQ and combined adapters against PEFT, really run. The models are those of test_peft.py.

PEFT runs LoftQ on a GPU alone ("cuda" is written into it): here its function runs with that device's name replaced.
"""

import copy
from functools import partial
from pathlib import Path
from types import FunctionType

import peft
import pytest
import torch
from peft.utils import loftq_utils
from torch import nn
from transformers import LlamaForCausalLM

from kernels import dequantize, quantize
from lora import LoRAConfig, add_adapter, combine_adapters, disabled_adapters, load_adapter, save_adapter
from lora.adapters import lora_layers
from lora.init import start_from_weight
from tests.accuracy import assert_as_accurate_as
from tests.peers.test_peft import (
    IDS,
    assert_same_logits,
    loaded_by_peft,
    ours_of,
    random_llama,
    their_layers,
    theirs_of,
)

DORA = {"r": 4, "lora_alpha": 6, "use_dora": True, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return random_llama()


def with_magnitudes(model: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    return model


def test_dora_both_ways(base: LlamaForCausalLM, tmp_path: Path) -> None:
    theirs = with_magnitudes(theirs_of(base, peft.LoraConfig(**DORA)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(ours_of(base), tmp_path / "theirs")
    assert_same_logits(ours, theirs)
    save_adapter(ours, tmp_path / "ours")
    assert_same_logits(ours, loaded_by_peft(base, tmp_path / "ours"))


def test_every_gradient_of_dora(base: LlamaForCausalLM, tmp_path: Path) -> None:
    theirs = with_magnitudes(theirs_of(base, peft.LoraConfig(**DORA))).train()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(ours_of(base), tmp_path, trainable=True).train()
    exact = copy.deepcopy(theirs).double()
    for model in (ours, theirs, exact):
        logits = model(IDS) if model is ours else model(IDS).logits
        nn.functional.cross_entropy(logits.flatten(0, 1).to(logits.dtype), IDS.flip(1).flatten()).backward()
    for path, layer in lora_layers(ours).items():
        plain, wanted = their_layers(theirs)[path], their_layers(exact)[path]
        for half in ("lora_A", "lora_B", "lora_magnitude_vector"):
            found = getattr(layer, half)["default"].grad
            assert_as_accurate_as(
                getattr(plain, half)["default"].weight.grad, found, getattr(wanted, half)["default"].weight.grad
            )


def test_dora_starts_at_the_same_magnitudes(base: LlamaForCausalLM) -> None:
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**DORA))
    ours = add_adapter(ours_of(base), LoRAConfig(r=4, alpha=6, use_dora=True))
    for path, layer in lora_layers(ours).items():
        there = their_layers(theirs)[path].lora_magnitude_vector["default"].weight
        # one sum of at most 24 squares, in one order or another
        assert torch.allclose(layer.lora_magnitude_vector["default"], there, rtol=24 * torch.finfo(torch.float32).eps)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights", "ignore:OLoRA changes the base weights")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_out_of_the_weight(base: LlamaForCausalLM, init: str, tmp_path: Path) -> None:
    """The same residual and update, and the file is the difference to the base, which PEFT reads."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = add_adapter(ours_of(base), LoRAConfig(r=4, alpha=6, init=init))
    eps = torch.finfo(torch.float32).eps
    for path, layer in lora_layers(ours.requires_grad_(False)).items():
        there = their_layers(theirs.requires_grad_(False))[path]
        W = base.get_submodule(path).weight.detach()
        residual, wanted = layer.base_layer.weight, there.base_layer.weight
        assert float((residual - wanted).norm()) < 100 * eps * float(
            W.norm()
        )  # two factorisations, each backward stable
        update = layer.lora_B["default"] @ layer.lora_A["default"]
        assert float(
            (update - there.lora_B["default"].weight @ there.lora_A["default"].weight).norm()
        ) < 100 * eps * float(W.norm())
    with torch.no_grad():
        for layer in lora_layers(ours).values():
            layer.lora_B["default"] += 0.1
        save_adapter(ours, tmp_path)
        for path, layer in lora_layers(ours).items():
            A, B = layer.lora_A["default"].double(), layer.lora_B["default"].double()
            W, added = layer.base_layer.weight.double(), layer.scaling["default"] * (B @ A)
            merged = loaded_by_peft(base, tmp_path).merge_and_unload().get_submodule(path).weight.double()
            # each of the three products has the rounding of its own size, and the sum that of the largest
            size = float(W.norm() + added.norm())
            assert float((merged - (W + added)).norm()) < 8 * eps * size
        with disabled_adapters(ours):
            off = ours(IDS)
        plain = base(IDS).logits
        assert float((off - plain).norm() / plain.norm()) < 1000 * eps


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq(iterations: int) -> None:
    """At scaling 1, where PEFT's is meant to be used: the same 4-bit codes, and the same update."""
    torch.manual_seed(0)
    W = torch.randn(64, 128)
    theirs = loftq_utils.loftq_init.__wrapped__
    places = tuple("cpu" if constant == "cuda" else constant for constant in theirs.__code__.co_consts)
    on_the_cpu = FunctionType(theirs.__code__.replace(co_consts=places), theirs.__globals__)
    with torch.no_grad():
        dense, A, B = on_the_cpu(W, 4, 8, iterations)
    start = start_from_weight(W, "loftq", 8, 1.0, partial(quantize, double_quant=False), loftq_iterations=iterations)
    assert torch.equal(dequantize(start.base), dense)
    assert torch.allclose(start.B @ start.A, B @ A, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "theirs", "options"),
    [("cat", "cat", {}), ("svd", "svd", {"svd_rank": 5}), ("ties", "ties_svd", {"svd_rank": 5, "density": 0.3})],
)
def test_combined(base: LlamaForCausalLM, method: str, theirs: str, options: dict, tmp_path: Path) -> None:
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]), "first"
    )
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=1, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination_type=theirs, **options)
    ours = ours_of(base)
    for name in ("first", "second"):
        load_adapter(ours, tmp_path / name, name)
    combine_adapters(
        ours,
        ["first", "second"],
        [0.7, 0.4],
        method=method,
        r=options.get("svd_rank"),
        density=options.get("density", 0.2),
    )
    model.requires_grad_(False)
    for path, layer in lora_layers(ours.requires_grad_(False)).items():
        there = their_layers(model, "both")[path]
        wanted = there.scaling["both"] * there.lora_B["both"].weight @ there.lora_A["both"].weight
        found = layer.scaling["combined"] * layer.lora_B["combined"] @ layer.lora_A["combined"]
        assert float((found - wanted).norm()) < 100 * torch.finfo(torch.float32).eps * float(wanted.norm())

"""What an adapter has beside linear layers' A and B, against PEFT: biases, whole modules, embeddings; and trees.

Every option goes both ways: saved here and loaded there, saved there and loaded here, equal logits, and nothing that
PEFT warns about in the files. The base is the small Llama of test_peft.py with biases, tied and untied.
"""

import copy
import re
import warnings
from functools import lru_cache
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import Embedding, LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import kernels
from lora import (
    LinearNF4,
    LoRAEmbedding,
    LoRALinear,
    SavedModule,
    add_adapter,
    count_parameters,
    disabled_adapters,
    load_adapter,
    load_adapters,
    merge_adapter,
    save_adapter,
    save_adapters,
    set_adapter,
    trainable_parameters,
    unmerge_adapter,
)
from lora.adapters import adapter_layers
from lora.peft_format import WEIGHTS
from models import load_model, save_model
from tests.accuracy import assert_as_accurate_as
from tests.peers.test_peft import IDS, LLAMA, SAVES_HEAD, assert_same_logits, our_config, ours_of, their_config

TIED = "ignore:Model has `tie_word_embeddings=True`"
OUR_TIED = "ignore:.*share one weight in this model"
pytestmark = pytest.mark.filterwarnings(SAVES_HEAD, TIED, OUR_TIED)

OPTIONS = [
    {"bias": "lora_only"},
    {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    {"bias": "all", "target_modules": ["q_proj"]},
    {"bias": "all", "target_modules": r".*mlp\.up_proj|lm_head"},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head", "model.embed_tokens"], "target_modules": ["q_proj"]},
    {"modules_to_save": ["norm"]},
    {"modules_to_save": ["model.norm", "q_proj", "0.mlp"], "bias": "all"},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True, "rank_pattern": {"embed_tokens": 2}},
    {"target_modules": r".*embed_tokens|.*\.1\..*v_proj", "alpha_pattern": {".*embed_tokens": 9}, "init": "gaussian"},
    {"target_modules": ["model.embed_tokens", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head", "input_layernorm"],
        "bias": "lora_only",
        "layers_to_transform": [0, 1],
        "dropout": 0.3,
    },
]
WITH_HEAD = [o for o in OPTIONS if "embed" in str(o) or "lm_head" in str(o)]
"""On a tied base, these are what tying matters to."""
CASES = [(False, options) for options in OPTIONS] + [(True, options) for options in WITH_HEAD]
EACH = pytest.mark.parametrize(("tied", "options"), CASES, ids=str)


@lru_cache
def base_of(tied: bool) -> LlamaForCausalLM:
    """Never changed: each test takes a copy. No weight is trivial: biases and norms are random too."""
    config = copy.deepcopy(LLAMA)
    config.tie_word_embeddings = tied
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand_like(parameter))
    return model


def randomize(model: nn.Module) -> None:
    """Everything that is trained, as training leaves it."""
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def theirs_of(base: LlamaForCausalLM, options: dict) -> peft.PeftModel:
    model = peft.get_peft_model(copy.deepcopy(base), their_config(options))
    randomize(model)
    return model.eval()


def their_sites(model: nn.Module, name: str = "default") -> dict[str, type]:
    """By path, what kind of thing PEFT has there. A bias that is trained in place has no wrapper."""
    sites: dict[str, type] = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper) and name in module.modules_to_save:
            sites[path] = SavedModule
        elif isinstance(module, LoraLayer) and name in {*module.lora_A, *module.lora_embedding_A}:
            sites[path] = LoRAEmbedding if isinstance(module, Embedding) else LoRALinear
    return sites


def our_sites(model: nn.Module, name: str = "default") -> dict[str, type]:
    layers = adapter_layers(model).items()
    return {p: type(m) for p, m in layers if name in m.adapters and name in getattr(m, "lora_A", {name})}


def files_hold_the_same(ours: Path, theirs: Path) -> None:
    """But for what PEFT adds: base weights, and biases inside a module saved whole or of another adapter's layer."""
    one, other = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    extra = {key for key in other.keys() - one.keys() if not key.endswith(("base_layer.weight", "base_layer.bias"))}
    assert all(key.endswith(".bias") and re.search(r"\.(original_module|modules_to_save)\.", key) for key in extra)
    assert one.keys() <= other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@EACH
def test_saved_here_loaded_there(tied: bool, options: dict, tmp_path: Path) -> None:
    """The same layers, as many trained numbers, the same logits; and what PEFT writes then is what we wrote."""
    ours = add_adapter(ours_of(base_of(tied)), our_config(options), "mine")
    randomize(ours)
    save_adapter(ours.eval(), tmp_path, "mine")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base_of(tied)), tmp_path, is_trainable=True).eval()
    assert their_sites(theirs) == our_sites(ours, "mine")
    assert_same_counts(ours, theirs)
    assert_same_logits(ours, theirs)
    theirs.save_pretrained(tmp_path / "again")
    files_hold_the_same(tmp_path, tmp_path / "again")


def assert_same_counts(ours: nn.Module, theirs: peft.PeftModel) -> None:
    trained, total = theirs.get_nb_trainable_parameters()
    for name, p in theirs.named_parameters():  # under bias="all" it also marks the original's of a module saved whole
        trained -= p.numel() if "original_module" in name and p.requires_grad else 0
    copies = sum(p.numel() for name, p in trainable_parameters(ours) if "trained_bias" in name)
    assert count_parameters(ours) == (trained, total + copies)


@EACH
def test_saved_there_loaded_here(tied: bool, options: dict, tmp_path: Path) -> None:
    """Also: switched off, the base is back to the bit."""
    theirs = theirs_of(base_of(tied), options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ours_of(base_of(tied))
    with torch.no_grad():
        before = ours(IDS)
    load_adapter(ours, tmp_path / "theirs")
    assert our_sites(ours) == their_sites(theirs)
    assert_same_logits(ours, theirs)
    with torch.no_grad(), disabled_adapters(ours):
        assert torch.equal(ours(IDS), before)
    save_adapter(ours, tmp_path / "ours")
    files_hold_the_same(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("tied", [False, True])
def test_switched_off_both_give_the_same_but_for_biases(tied: bool) -> None:
    """PEFT trains the base's own bias, so its model stays changed when the adapter is off, and it warns of it."""
    for bias in ("none", "all"):
        options = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head", "norm"], "bias": bias}
        theirs = theirs_of(base_of(tied), options)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
            with theirs.disable_adapter():
                off = theirs(IDS).logits
            assert torch.equal(off, base_of(tied)(IDS).logits) is (bias == "none")


WHOLE = [
    {"bias": "all", "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    {"bias": "lora_only", "target_modules": ["up_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]},
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_every_gradient_is_theirs(tied: bool, options: dict, tmp_path: Path) -> None:
    """Gradients of everything that is trained, and of nothing else, as near to float64 as theirs.

    Each tensor by its own length, then all together: whether the roundings of one small bias add up or cancel is luck
    (of the hundred tensors here, the reference backend has one at 1.9 times their error and the C kernels one at 2.6).
    """
    theirs = theirs_of(base_of(tied), options)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(ours_of(base_of(tied)), tmp_path, trainable=True)
    exact = copy.deepcopy(theirs).double()
    for model in (ours, theirs, exact):
        logits = model(IDS) if model is ours else model(IDS).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flip(1).flatten()).backward()
    plain, wanted = gradients_of(theirs), gradients_of(exact)
    found = {their_name(ours, name): p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == plain.keys()
    by_length = {name: 1 / gradient.norm() for name, gradient in wanted.items()}
    together = [
        torch.cat([(gradients[name].double() * length).flatten() for name, length in by_length.items()])
        for gradients in (plain, found, wanted)
    ]
    assert_as_accurate_as(*together)
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == {
        name for name, _ in trainable_parameters(ours)
    }


def gradients_of(theirs: nn.Module) -> dict[str, Tensor]:
    named = theirs.base_model.model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def their_name(ours: nn.Module, name: str) -> str:
    """Matrices have a module each there, and a bias is the base layer's."""
    for half in ("lora_A", "lora_B"):
        name = name.replace(f"{half}.default", f"{half}.default.weight")
    path, is_bias, _ = name.partition(".trained_bias.default")
    if not is_bias:
        return name
    return f"{path}{'.base_layer' if path in our_sites(ours) else ''}.bias"


@pytest.mark.parametrize("tied", [False, True])
def test_a_tree_saved_there(tied: bool, tmp_path: Path) -> None:
    """Its "default" lies at the top, others in folders of their name. One has what the other has not."""
    theirs = theirs_of(base_of(tied), {"target_modules": ["q_proj", "embed_tokens"], "bias": "lora_only"})
    theirs.add_adapter("my-second", their_config({"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}))
    theirs.set_adapter("my-second")
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path)
    ours = ours_of(base_of(tied))
    assert load_adapters(ours, tmp_path) == ["default", "my-second"]
    assert ours.adapter_state.active == ("default",)
    theirs.set_adapter("default")
    assert_same_logits(ours, theirs)
    save_adapters(ours, tmp_path / "ours")
    for below in ("", "my-second"):
        files_hold_the_same(tmp_path / "ours" / below, tmp_path / below)


def test_a_tree_saved_here(tmp_path: Path) -> None:
    ours = add_adapter(ours_of(base_of(False)), our_config({"target_modules": ["q_proj", "embed_tokens"]}))
    randomize(ours)
    add_adapter(ours, our_config({"modules_to_save": ["lm_head"], "bias": "all"}), "second")
    randomize(ours)
    save_adapters(ours.eval(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base_of(False)), tmp_path)
    set_adapter(ours, "default")
    assert_same_logits(ours, theirs)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base_of(False)), tmp_path / "second", "second")
    set_adapter(ours, "second")
    assert_same_logits(ours, theirs)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Input and output embeddings")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_merged(tied: bool, options: dict, tmp_path: Path) -> None:
    """And what is saved of it is untied where merging untied it, as PEFT has it."""
    theirs = theirs_of(base_of(tied), options)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(ours_of(base_of(tied)), tmp_path / "adapter")
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    report = merge_adapter(ours)
    assert_same_logits(ours, theirs)
    if not (tied and "lm_head" in options["target_modules"]):  # PEFT adds both updates to the one shared weight
        for name, tensor in theirs.merge_and_unload().state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor)
    save_model(ours, tmp_path / "model")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert again.config.tie_word_embeddings is False
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, ours(IDS))
    unmerge_adapter(ours, report)
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


# Over bitsandbytes' 4 bits


FOUR_BIT = LlamaConfig(
    **{**LLAMA.to_dict(), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "attention_bias": True}
)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "lora_only", "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
        {"bias": "all", "modules_to_save": ["lm_head", "norm"], "target_modules": ["v_proj", "up_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_over_a_4_bit_base(quant_type: str, options: dict, tmp_path: Path) -> None:
    """transformers quantizes the same folder as we do; K is a multiple of the block size (test_bitsandbytes.py)."""
    base = LlamaForCausalLM(FOUR_BIT)
    base.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(in_4_bits(tmp_path / "base", quant_type), their_config(options))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(load_model(str(tmp_path / "base"), quantize=quant_type), tmp_path / "theirs")
    exact = copy.deepcopy(theirs.base_model.model)
    with torch.no_grad():
        plain = theirs(IDS).logits
        for path, module in list(ours.named_modules()):  # the same model in float64, on the dequantized weights
            if isinstance(module, LinearNF4):
                weight = kernels.dequantize(module.quantized, torch.float64)
                outer = path.removesuffix(".base_layer")  # where bias alone is trained, PEFT has no layer of its own
                path = path if isinstance(exact.get_submodule(outer), LoraLayer) else outer
                exact.set_submodule(path, dense(weight, exact.get_submodule(path).bias))
        wanted = exact.double()(IDS).logits
        assert_as_accurate_as(plain, ours(IDS), wanted)
        save_adapter(ours, tmp_path / "ours")
        files_hold_the_same(tmp_path / "ours", tmp_path / "theirs")
        again = peft.PeftModel.from_pretrained(in_4_bits(tmp_path / "base", quant_type), tmp_path / "ours")
        torch.testing.assert_close(again.train()(IDS).logits, plain)


def in_4_bits(folder: Path, quant_type: str) -> LlamaForCausalLM:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="float32",
    )
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu")
    return model.train()  # in eval mode it may repack its weights for another kernel


def dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.double())
    return layer

"""lora/ against PEFT, really run: the same layers, scalings, gradients and sums, and adapters that go both ways.

The base is a small transformers Llama with random weights; ours is a Decoder that holds the same. "exact" is PEFT's
model in float64, so that each side's fp32 error can be measured. Options that we refuse are in test_peft_options.py.
"""

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora import (
    LoRAConfig,
    add_adapter,
    count_parameters,
    disabled_adapters,
    load_adapter,
    merge_adapter,
    quantize_model,
    save_adapter,
    set_adapter,
)
from lora.adapters import lora_layers
from lora.peft_format import WEIGHTS
from models.config import DecoderConfig
from models.decoder import Decoder
from tests.accuracy import assert_as_accurate_as

VOCAB = 40
IDS = torch.arange(VOCAB).view(2, 20)
LLAMA = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """Never changed: each test takes a copy."""
    return random_llama()


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


def ours_of(base: LlamaForCausalLM) -> Decoder:
    model = Decoder(DecoderConfig.from_hf(base.config.to_dict()))
    model.load_state_dict(base.state_dict())
    return model.eval()


def theirs_of(base: LlamaForCausalLM, config: peft.LoraConfig) -> peft.PeftModel:
    """A PEFT model as training leaves it: B is no longer zero."""
    model = peft.get_peft_model(copy.deepcopy(base), config)
    randomize(model)
    return model.eval()


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)


def loaded_by_peft(base: LlamaForCausalLM, folder: Path) -> peft.PeftModel:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert same_tensors(peft.get_peft_model_state_dict(model), load_file(folder / WEIGHTS))
    return model.eval()


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same adapter. Of a head, PEFT adds a copy of the base's weight."""
    one, other = ({key: t for key, t in each.items() if "base_layer" not in key} for each in (one, other))
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def assert_same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    """Ours are as near to float64 as theirs are."""
    with torch.no_grad():
        found, plain, exact = ours(IDS), theirs(IDS).logits, copy.deepcopy(theirs).double()(IDS).logits
    assert_as_accurate_as(plain, found, exact)


def their_layers(model: peft.PeftModel, name: str = "default") -> dict[str, LoraLayer]:
    modules = model.base_model.model.named_modules()
    return {path: m for path, m in modules if isinstance(m, LoraLayer) and name in m.lora_A}


SAVES_HEAD = "ignore:Setting `save_embedding_layers` to `True`"

# Our names for their fields, and options that both take
NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
OPTIONS = [
    {},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]},
    {"target_modules": ["q_proj", "no_such_layer"]},
    {"target_modules": r".*\.(0|2)\..*_proj"},
    {"target_modules": r"model\.layers\.\d+\.mlp\.(gate|up)_proj|lm_head"},
    {"exclude_modules": ["down_proj"]},
    {"exclude_modules": ["model.layers.0.mlp.up_proj", "self_attn.k_proj"]},
    {"exclude_modules": r".*\.mlp\..*"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": r".*proj", "exclude_modules": ["o_proj"]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"], "layers_to_transform": [2]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 5}, "alpha_pattern": {"mlp.gate_proj": 1, "up_proj": 3}},
    {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 6, "q_proj": 7}, "use_rslora": True},
    {"rank_pattern": {"q_proj|k_proj": 2}, "alpha_pattern": {r"(q|k)_proj": 32}, "r": 8, "alpha": 4},
    {"use_rslora": True, "init": "gaussian"},
]
OVERLAPPING = {"rank_pattern": {"q_proj": 2, r"layers\.1\..*": 5, ".*": 3}, "alpha_pattern": {"up_proj": 3, ".*": 1}}
"""Here the first key that matches decides, and keys sorted are in another order."""


def our_config(options: dict) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "alpha": 6, **options})


def their_config(options: dict) -> peft.LoraConfig:
    given = {"r": 4, "alpha": 6, "target_modules": "all-linear", **options}
    if given.pop("init", None):
        given["init_lora_weights"] = options["init"]
    return peft.LoraConfig(task_type="CAUSAL_LM", **{NAMES.get(name, name): value for name, value in given.items()})


# The same layers


@pytest.mark.parametrize("options", [*OPTIONS, OVERLAPPING], ids=str)
def test_the_same_layers_ranks_scalings_and_counts(base: LlamaForCausalLM, options: dict) -> None:
    theirs = peft.get_peft_model(copy.deepcopy(base), their_config(options))
    expected = {path: (layer.r["default"], layer.scaling["default"]) for path, layer in their_layers(theirs).items()}
    assert expected
    for ours in (ours_of(base), copy.deepcopy(base)):
        add_adapter(ours, our_config(options))
        found = {
            path: (layer.lora_A["default"].shape[0], layer.scaling["default"])
            for path, layer in lora_layers(ours).items()
        }
        assert found == expected
        assert count_parameters(ours) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["no_such_layer"]},
        {"target_modules": ["proj"]},
        {"target_modules": "q_proj"},
        {"target_modules": r".*\.q_"},
        {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [9]},
        {"target_modules": ["q_proj", "mlp"]},
        {"target_modules": r".*\.mlp.*"},
        {"target_modules": r".*q_proj", "layers_to_transform": [1]},
        {"r": 0},
    ],
    ids=str,
)
def test_what_peft_refuses_is_refused(base: LlamaForCausalLM, options: dict) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # its wording is its own
        peft.get_peft_model(copy.deepcopy(base), their_config(options))
    with pytest.raises(ValueError, match=r"target_modules|LoRA"):
        add_adapter(ours_of(base), our_config(options))


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_starts_as_there(init: bool | str) -> None:
    """Equal random numbers give equal weights."""
    layer = nn.Sequential(nn.Linear(30, 20))
    torch.manual_seed(5)
    theirs = peft.get_peft_model(
        copy.deepcopy(layer), peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    )
    module = their_layers(theirs)["0"]
    torch.manual_seed(5)
    module.reset_lora_parameters("default", init)
    torch.manual_seed(5)
    ours = lora_layers(add_adapter(layer, LoRAConfig(r=4, init="gaussian" if init == "gaussian" else "kaiming")))["0"]
    assert torch.equal(ours.lora_A["default"], module.lora_A["default"].weight)
    assert torch.equal(ours.lora_B["default"], module.lora_B["default"].weight)


# Both ways


@pytest.mark.filterwarnings(SAVES_HEAD)
@pytest.mark.parametrize("options", [*OPTIONS, OVERLAPPING], ids=str)
def test_an_adapter_saved_here_gives_the_same_logits_there(
    base: LlamaForCausalLM, options: dict, tmp_path: Path
) -> None:
    ours = add_adapter(ours_of(base), our_config(options), "mine")
    randomize(ours)
    save_adapter(ours.eval(), tmp_path, "mine")
    theirs = loaded_by_peft(base, tmp_path)
    assert their_layers(theirs).keys() == lora_layers(ours).keys()
    assert_same_logits(ours, theirs)


@pytest.mark.filterwarnings(SAVES_HEAD)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_adapter_saved_there_gives_the_same_logits_here_and_goes_back(
    base: LlamaForCausalLM, options: dict, tmp_path: Path
) -> None:
    theirs = theirs_of(base, their_config(options))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(ours_of(base), tmp_path / "theirs")
    assert lora_layers(ours).keys() == their_layers(theirs).keys()
    assert_same_logits(ours, theirs)
    save_adapter(ours, tmp_path / "ours")
    assert same_tensors(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))
    with torch.no_grad():
        assert torch.equal(loaded_by_peft(base, tmp_path / "ours")(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize(
    "options", [{"layers_to_transform": 1}, {"layers_to_transform": [0, 1], "layers_pattern": "layers"}], ids=str
)
def test_their_other_ways_to_name_layers(base: LlamaForCausalLM, options: dict, tmp_path: Path) -> None:
    theirs = theirs_of(base, their_config({"target_modules": ["q_proj", "up_proj"], **options}))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(ours_of(base), tmp_path / "theirs")
    assert lora_layers(ours).keys() == their_layers(theirs).keys()
    save_adapter(ours, tmp_path / "ours")
    assert_same_logits(ours, loaded_by_peft(base, tmp_path / "ours"))


def test_sorted_patterns_are_refused_as_there(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """Its files sort the keys of a pattern, so with overlapping ones they no longer say which was first."""
    theirs_of(base, their_config(OVERLAPPING)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded_by_peft(base, tmp_path)
    with pytest.raises(ValueError, match=r"q_proj has rank 2 in .* and 3 by the fields of"):
        load_adapter(ours_of(base), tmp_path)


@pytest.mark.filterwarnings(SAVES_HEAD, "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_a_tied_head(quantized: bool, tmp_path: Path) -> None:
    """The adapter is the head's alone. PEFT's file holds a copy of the base's head, which must be this base's."""
    config = copy.deepcopy(LLAMA)
    config.tie_word_embeddings = True
    base = LlamaForCausalLM(config).eval()
    theirs = theirs_of(base, their_config({"target_modules": ["q_proj", "lm_head"]}))
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    ours = ours_of(base)
    if quantized:
        quantize_model(ours)
    load_adapter(ours, tmp_path)
    assert ours.lm_head.base_layer.weight is ours.model.embed_tokens.weight
    if not quantized:
        assert_same_logits(ours, theirs)
    other = ours_of(base)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"another base model: .*lm_head\.base_layer\.weight is not this"):
        load_adapter(other, tmp_path)


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.parametrize("init", [False, "orthogonal", "eva"])
def test_a_start_that_leaves_the_base_alone_is_read(base: LlamaForCausalLM, init: bool | str, tmp_path: Path) -> None:
    extra = {"eva_config": peft.EvaConfig()} if init == "eva" else {}
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM", **extra)
    theirs = theirs_of(base, config)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load_adapter(ours_of(base), tmp_path), theirs)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_pissa_adapter_is_read_and_a_raw_one_refused(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """Its base is not the model's: W − s·BA at the start. PEFT can write it as a plain adapter of twice the rank."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.peft_config["default"].init_lora_weights = True  # as its guide says: what comes next is the start
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the math"):
        load_adapter(ours_of(base), tmp_path / "raw")
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = load_adapter(ours_of(base), tmp_path / "plain")
    with torch.no_grad():
        exact = copy.deepcopy(theirs).eval().double()(IDS).logits
        assert_as_accurate_as(loaded_by_peft(base, tmp_path / "plain")(IDS).logits, ours(IDS), exact)


def test_several_adapters_one_by_one_summed_and_disabled(base: LlamaForCausalLM, tmp_path: Path) -> None:
    first = {"target_modules": ["q_proj", "up_proj"], "r": 2}
    second = {"target_modules": r".*\.[qk]_proj", "use_rslora": True}
    theirs = theirs_of(base, their_config(first))
    theirs.add_adapter("second", their_config(second))
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path)  # "default" at the top, others in folders of their name
    ours = load_adapter(ours_of(base), tmp_path)
    load_adapter(ours, tmp_path / "second", "second")
    for names in ("default", "second", ["default", "second"]):
        set_adapter(ours, names)
        theirs.base_model.set_adapter(names)
        assert_same_logits(ours, theirs)
    with torch.no_grad(), disabled_adapters(ours), theirs.disable_adapter():
        assert_as_accurate_as(theirs(IDS).logits, ours(IDS), copy.deepcopy(base).double()(IDS).logits)


def test_a_bf16_base_keeps_its_adapter_in_fp32_on_both_sides(base: LlamaForCausalLM, tmp_path: Path) -> None:
    theirs = theirs_of(copy.deepcopy(base).bfloat16(), their_config({}))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(ours_of(base).bfloat16(), tmp_path / "theirs")
    assert {p.dtype for layer in lora_layers(ours).values() for p in layer.lora_A.values()} == {torch.float32}
    save_adapter(ours, tmp_path / "ours")
    assert same_tensors(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))


# The same training


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_gradient_is_theirs(base: LlamaForCausalLM, dropout: float, tmp_path: Path) -> None:
    """Dropout draws in the order of the layers on both sides, so equal seeds give equal masks."""
    theirs = theirs_of(base, their_config({"dropout": dropout, "use_rslora": True})).train()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(ours_of(base), tmp_path, trainable=True).train()
    exact = copy.deepcopy(theirs).double()
    for model in (ours, theirs, exact):
        torch.manual_seed(3)
        logits = model(IDS) if model is ours else model(IDS).logits
        nn.functional.cross_entropy(logits.flatten(0, 1).to(logits.dtype), IDS.flip(1).flatten()).backward()
    if dropout:  # masks of float64 are drawn otherwise: compare the two fp32 models, sums of as many terms
        for path, layer in lora_layers(ours).items():
            for half in ("lora_A", "lora_B"):
                found = getattr(layer, half)["default"].grad
                there = getattr(their_layers(theirs)[path], half)["default"].weight.grad
                terms = IDS.numel() * max(found.shape)
                assert (found - there).norm() <= terms * torch.finfo(torch.float32).eps * there.norm(), path
        return
    for path, layer in lora_layers(ours).items():
        for half in ("lora_A", "lora_B"):
            plain, found, wanted = (
                getattr(m, half)["default"] for m in (their_layers(theirs)[path], layer, their_layers(exact)[path])
            )
            assert_as_accurate_as(plain.weight.grad, found.grad, wanted.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_weights(base: LlamaForCausalLM, dtype: torch.dtype, tmp_path: Path) -> None:
    """Ours sums in fp32 and rounds once; theirs rounds BA to the base's dtype first, so it is not nearer."""
    theirs = theirs_of(copy.deepcopy(base).to(dtype), their_config({}))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(ours_of(base).to(dtype), tmp_path)
    merge_adapter(ours)
    exact = copy.deepcopy(theirs).double().merge_and_unload().state_dict()
    for name, plain in theirs.merge_and_unload().state_dict().items():
        assert_as_accurate_as(plain, ours.state_dict()[name], exact[name])

"""Every field of PEFT's LoraConfig, really written by PEFT: computed here, refused by name, or without effect."""

import copy
import dataclasses
import json
from pathlib import Path

import peft
import pytest
from transformers import LlamaForCausalLM

from lora import load_adapter
from lora.peft_format import CONFIG, UNSUPPORTED
from tests.peers.test_peft import ours_of, random_llama, their_config, theirs_of

COMPUTED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
    "modules_to_save",
}
REFUSED_VALUES = {
    "lora_bias": [True],
    "fan_in_fan_out": [True],
    "target_parameters": [["self_attn.q_proj.weight"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [3]}],
    "layer_replication": [[(0, 2), (1, 3)]],
    "alora_invocation_tokens": [[1]],
    "use_bdlora": [peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["q_proj"])],
    "use_qalora": [True],
    "arrow_config": [peft.ArrowConfig()],
    "kasa_config": [peft.tuners.lora.KasaConfig()],
    "monteclora_config": [peft.tuners.lora.MontecloraConfig()],
    "velora_config": [peft.tuners.lora.VeloraConfig()],
    "ensure_weight_tying": [True],
    "init_lora_weights": ["pissa", "pissa_niter_2", "olora", "loftq", "corda", "lora_ga", "mica"],
}
NO_MATH = {
    "peft_type",  # checked: must be LORA
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",  # use_qalora alone turns it on
    "loftq_config",  # these belong to values of init_lora_weights
    "eva_config",
    "corda_config",
    "lora_ga_config",
}


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """Never changed: each test takes a copy."""
    return random_llama()


def test_every_field_of_their_config_is_accounted_for() -> None:
    """A new version's new field fails here until someone has read what it does."""
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == COMPUTED | set(REFUSED_VALUES) | NO_MATH
    assert set(UNSUPPORTED) | {"init_lora_weights"} == set(REFUSED_VALUES)


def test_their_default_means_off() -> None:
    defaults = peft.LoraConfig()
    assert all(getattr(defaults, field) == off for field, off in UNSUPPORTED.items())


@pytest.mark.filterwarnings("ignore")  # it warns that some combinations are unusual
@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED_VALUES.items() for value in values], ids=str
)
def test_an_option_we_do_not_compute_is_refused_by_name(
    base: LlamaForCausalLM, field: str, value: object, tmp_path: Path
) -> None:
    theirs_of(base, their_config({})).save_pretrained(tmp_path)
    load_adapter(ours_of(base), tmp_path)  # good until the option is set
    options = {} if value == "loftq" else {field: value}  # its constructor wants SciPy for loftq
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    setattr(config, field, value)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())[field]
    with pytest.raises(ValueError, match=rf"{CONFIG}: .*{field}") as error:
        load_adapter(ours_of(base), tmp_path)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_method_is_refused(base: LlamaForCausalLM, tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type must be 'LORA', got 'IA3'"):
        load_adapter(ours_of(base), tmp_path)

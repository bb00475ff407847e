"""lora/config.py: scaling, which layers an adapter sits on, and one clear line for values that make no adapter.

That the selection is PEFT's is checked against PEFT itself in tests/peers/test_peft.py.
"""

import math

import pytest

from lora import LoRAConfig

Q3 = "model.layers.3.self_attn.q_proj"
UP3 = "model.layers.3.mlp.up_proj"


def test_scaling_is_alpha_over_r() -> None:
    assert LoRAConfig(r=8, alpha=4).scaling(Q3) == 0.5
    assert LoRAConfig(r=16, alpha=16).scaling(Q3) == 1


def test_rslora_scales_by_the_root_of_r() -> None:
    assert LoRAConfig(r=8, alpha=4, use_rslora=True).scaling(Q3) == 4 / math.sqrt(8)


def test_patterns_choose_r_and_alpha_before_scaling() -> None:
    config = LoRAConfig(r=8, alpha=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6})
    assert (config.rank(Q3), config.scaling(Q3)) == (2, 3)
    assert (config.rank(UP3), config.scaling(UP3)) == (8, 0.5)
    rslora = LoRAConfig(r=8, alpha=4, use_rslora=True, rank_pattern={"q_proj": 2})
    assert rslora.scaling(Q3) == 4 / math.sqrt(2)


@pytest.mark.parametrize(
    ("pattern", "r"),
    [
        ({"q_proj": 2}, 2),
        ({"roj": 2}, 8),
        ({r".*roj": 2}, 2),
        ({r"layers\.3\..*": 2}, 2),
        ({"^model.layers.3.self_attn.q_proj": 2}, 2),
        ({"^self_attn.q_proj": 2}, 8),
        ({"k_proj|q_proj": 2}, 2),
        ({"self_attn": 2}, 8),
        ({"self_attn.q_proj": 3, "q_proj": 2}, 3),
        ({"q_proj": 2, "self_attn.q_proj": 3}, 2),
    ],
)
def test_a_rank_pattern_matches_the_end_of_a_path_and_the_first_key_wins(pattern: dict[str, int], r: int) -> None:
    assert LoRAConfig(r=8, rank_pattern=pattern).rank(Q3) == r


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, True),
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["self_attn.q_proj"]}, True),
        ({"target_modules": [Q3]}, True),
        ({"target_modules": ["proj"]}, False),
        ({"target_modules": ["self_attn"]}, False),
        ({"target_modules": []}, False),
        ({"target_modules": r".*\.q_proj"}, True),
        ({"target_modules": "q_proj"}, False),
        ({"target_modules": r"(?:.*\.)?layers\.(\d+)\.(self_attn|mlp)\.(q|k|v)_proj"}, True),
        (
            {"target_modules": r"(?:.*?(?:vision).*?(?:mlp).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.q_proj)"},
            True,
        ),
        ({"target_modules": r".*\.q_"}, False),
        ({"target_modules": r"model\.layers\.[0-2]\..*"}, False),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, False),
        ({"exclude_modules": ["layers.3.self_attn.q_proj"]}, False),
        ({"exclude_modules": r".*layers\.3.*"}, False),
        ({"exclude_modules": r"layers\.3.*"}, True),
        ({"target_modules": [Q3], "exclude_modules": [Q3]}, False),
        ({"layers_to_transform": [3]}, True),
        ({"layers_to_transform": [0, 2]}, False),
        ({"layers_to_transform": []}, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, False),
        ({"layers_to_transform": [3], "layers_pattern": "layers"}, True),
        ({"layers_to_transform": [3], "layers_pattern": ["h", "layers"]}, True),
        ({"layers_to_transform": [3], "layers_pattern": "h"}, False),
        ({"layers_to_transform": [3], "layers_pattern": r"lay\w+"}, True),
        ({"modules_to_save": ["q_proj"]}, False),
        ({"modules_to_save": ["self_attn"]}, False),
        ({"modules_to_save": ["layers.3"], "target_modules": [Q3]}, False),
        ({"modules_to_save": ["proj", "mlp"]}, True),
        ({"target_modules": [Q3], "layers_to_transform": [0]}, True),
    ],
)
def test_targets(options: dict, chosen: bool) -> None:
    assert LoRAConfig(**options).targets(Q3) is chosen


@pytest.mark.parametrize(
    ("path", "number"),
    [("model.layers.3.mlp.experts.1.up_proj", 3), ("encoder.block.11.up_proj", 11), ("a.1.layers.2.up_proj", 2)],
)
def test_the_layer_number_is_the_first_with_two_names_before_it(path: str, number: int) -> None:
    assert LoRAConfig(layers_to_transform=[number]).targets(path)
    assert not LoRAConfig(layers_to_transform=[number + 1]).targets(path)


@pytest.mark.parametrize("path", ["lm_head", "layers.3.up_proj"])
def test_a_path_without_a_layer_number_is_in_no_layer(path: str) -> None:
    assert not LoRAConfig(layers_to_transform=[0, 3]).targets(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank r must be a whole number above 0, got 0"),
        ({"r": -1, "rank_pattern": {"r": 4}}, "rank r must be .* got -1"),
        ({"r": 2.5}, "got 2.5"),
        ({"r": True}, "got True"),
        ({"rank_pattern": {"q_proj": 0}}, "rank q_proj must be"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map"),
        ({"rank_pattern": {"q_(": 2}}, r"rank_pattern must hold regexes, got 'q_\('"),
        ({"alpha": 0}, "alpha must be above 0, got 0"),
        ({"alpha": math.inf}, "alpha must be above 0, got inf"),
        ({"alpha": "16"}, "alpha must be above 0, got '16'"),
        ({"alpha_pattern": {"q_proj": -2}}, "q_proj must be above 0, got -2"),
        ({"alpha_pattern": {"[": 2}}, "alpha_pattern must hold regexes"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"dropout": math.nan}, "got nan"),
        ({"dropout": "0.1"}, "got '0.1'"),
        ({"init": "corda"}, "init must be one of kaiming, gaussian, pissa, pissa_niter_4 .*, got 'corda'"),
        ({"bias": "every"}, "bias must be one of none, all, lora_only, got 'every'"),
        ({"r": 65_537}, "rank r must be at most 65536, got 65537"),
        ({"r": 10**400}, r"rank r must be at most 65536, got 1000.*\.\.\.$"),
        ({"alpha": 10**400}, "alpha must be above 0, got 1000"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "q_proj must be above 0, got 1000"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, got 'lm_head'"),
        ({"modules_to_save": ["lm_head", 3]}, "modules_to_save must be a list of names"),
        ({"modules_to_save": [""]}, "modules_to_save must hold names, got an empty one"),
        ({"modules_to_save": ["lm_("]}, r"modules_to_save must hold regexes, got 'lm_\('"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"layers_pattern": "(", "layers_to_transform": [0]}, r"layers_pattern must hold regexes, got '\('"),
        ({"layers_pattern": "(?P<number>x)", "layers_to_transform": [0]}, "layers_pattern must hold regexes"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, r"rank_pattern must hold regexes, got '\(\?i\)q_proj'"),
        (
            {"target_modules": "(.*)*x"},
            r"target_modules must hold regexes with .* no repeated group, got '\(\.\*\)\*x'",
        ),
        ({"target_modules": r"(a*\\)*b"}, "target_modules must hold regexes with .* no repeated group"),
        ({"target_modules": "(?x)(a*) *b"}, "target_modules must hold regexes with .* no repeated group"),
        ({"target_modules": "(a|b){2,}x"}, "target_modules must hold regexes with .* no repeated group"),
        ({"target_modules": "a" * 20_001}, "target_modules must hold regexes of at most 20000 characters"),
        ({"target_modules": ["a"] * 20_001}, "target_modules must hold at most 20000 names"),
        ({"rank_pattern": dict.fromkeys(map(str, range(20_001)), 1)}, "rank_pattern must hold at most 20000 names"),
        ({"bias": {"a" * 200: 1}}, r"bias must be one of none, all, lora_only, got \{'aaaa.{1,80}\.\.\.$"),
        ({"exclude_modules": ".*" * 8}, "exclude_modules must hold regexes with at most 7 repeats"),
        ({"rank_pattern": {"a?" * 20 + "a" * 20: 2}}, "rank_pattern must hold regexes with at most 7 repeats"),
        ({"target_modules": "q_("}, r"target_modules must hold regexes, got 'q_\('"),
        ({"target_modules": 5}, "target_modules must be a regex or a list of names, got 5"),
        ({"target_modules": ["q_proj", 5]}, "target_modules must be a regex or a list of names"),
        ({"exclude_modules": "*"}, "exclude_modules must hold regexes"),
        ({"exclude_modules": [None]}, "exclude_modules must be a regex or a list of names"),
        ({"layers_to_transform": 3}, "layers_to_transform must be a list of layer numbers, got 3"),
        ({"layers_to_transform": "3"}, "layers_to_transform must be a list of layer numbers, got '3'"),
        ({"layers_to_transform": [True]}, "layers_to_transform must be a list of layer numbers"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform needs a list"),
    ],
)
def test_a_value_that_makes_no_adapter_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        LoRAConfig(**options)
    assert "\n" not in str(error.value)

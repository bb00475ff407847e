"""quant/bnb_format.py without bitsandbytes: keys, dtypes, JSON, round trips, and one clear line for a damaged file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant import QuantizedTensor, dequantize, from_bnb_state_dict, quantize, to_bnb_state_dict
from tests.test_quantized_tensor import same_bits

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def as_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def text_of(tensor: torch.Tensor) -> str:
    return bytes(tensor.tolist()).decode()


def tensors_of_a_layer(**options) -> dict[str, torch.Tensor]:
    return to_bnb_state_dict(quantize(torch.randn(200, 96).bfloat16(), **options), NAME)


def test_keys_dtypes_and_shapes_with_double_quantization() -> None:
    described = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors_of_a_layer().items()}
    length = described.pop(STATE)[1]
    assert described == {
        NAME: (torch.uint8, (9600, 1)),
        f"{NAME}.absmax": (torch.uint8, (300,)),
        f"{NAME}.quant_map": (torch.float32, (16,)),
        f"{NAME}.nested_absmax": (torch.float32, (2,)),
        f"{NAME}.nested_quant_map": (torch.float32, (256,)),
    }
    assert len(length) == 1


def test_keys_dtypes_and_shapes_without_double_quantization() -> None:
    tensors = tensors_of_a_layer(double_quant=False, quant_type="fp4")
    described = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    described.pop(f"{NAME}.quant_state.bitsandbytes__fp4")
    assert described == {
        NAME: (torch.uint8, (9600, 1)),
        f"{NAME}.absmax": (torch.float32, (300,)),
        f"{NAME}.quant_map": (torch.float32, (16,)),
    }


def test_the_json_is_the_text_that_bitsandbytes_writes() -> None:
    q = quantize(torch.randn(200, 96).bfloat16())
    assert text_of(to_bnb_state_dict(q, NAME)[STATE]) == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [200, 96], "nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {q.absmax_offset.item()!r}}}'
    )
    assert text_of(tensors_of_a_layer(double_quant=False)[STATE]) == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [200, 96]}'
    )


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1,), (33, 3), (2, 5, 64)])
def test_written_and_read_again_is_the_same_weight(shape, quant_type: str, double_quant: bool) -> None:
    q = quantize(torch.randn(shape).half(), quant_type=quant_type, blocksize=32, double_quant=double_quant)
    again = from_bnb_state_dict(to_bnb_state_dict(q, NAME), NAME)
    assert same_bits(again, q)
    assert (again.shape, again.dtype, again.quant_type, again.blocksize) == (shape, torch.float16, quant_type, 32)


def test_two_layers_fit_in_one_safetensors_file(tmp_path: Path) -> None:
    weights = {name: quantize(torch.randn(64, 96)) for name in ("a.weight", "b.weight")}
    save_file({k: t for name, q in weights.items() for k, t in to_bnb_state_dict(q, name).items()}, tmp_path / "m")
    stored = load_file(tmp_path / "m")
    for name, q in weights.items():
        assert same_bits(from_bnb_state_dict(stored, name), q)


def test_maps_read_from_a_file_are_shared_between_layers() -> None:
    first, second = (from_bnb_state_dict(tensors_of_a_layer(), NAME) for _ in range(2))
    assert first.code.data_ptr() == second.code.data_ptr()
    assert first.absmax_code.data_ptr() == second.absmax_code.data_ptr()


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_packed_bytes_stored_under_another_dtype_are_read(storage: torch.dtype) -> None:
    q = quantize(torch.randn(64, 96))
    tensors = to_bnb_state_dict(q, NAME)
    tensors[NAME] = tensors[NAME].view(-1).view(storage).view(-1, 1)
    assert same_bits(from_bnb_state_dict(tensors, NAME), q)


@pytest.mark.parametrize("quant_type", ["int4", "nf3"])
def test_a_type_that_bitsandbytes_lacks_is_not_written(quant_type: str) -> None:
    with pytest.raises(ValueError, match=f"nf4 and fp4 weights, got '{quant_type}' for {NAME}"):
        to_bnb_state_dict(quantize(torch.randn(64), quant_type=quant_type), NAME)


def test_a_dtype_that_bitsandbytes_lacks_is_not_written() -> None:
    with pytest.raises(ValueError, match="got float64"):
        to_bnb_state_dict(quantize(torch.randn(64).double()), NAME)


def damaged(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A layer's tensors with some replaced, or taken away (None); keys are what follows the weight's name."""
    tensors = tensors_of_a_layer()
    for suffix, tensor in changes.items():
        key = NAME if suffix == "packed" else f"{NAME}.{suffix}"
        tensors.pop(key)
        if tensor is not None:
            tensors[key] = tensor
    return tensors


@pytest.mark.parametrize("suffix", ["packed", "absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_missing_tensor_is_named(suffix: str) -> None:
    key = NAME if suffix == "packed" else f"{NAME}.{suffix}"
    with pytest.raises(ValueError, match=f"{key}, which is missing"):
        from_bnb_state_dict(damaged(**{suffix: None}), NAME)


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("packed", torch.zeros(9599, 1, dtype=torch.uint8), "9600 .*got 9599"),
        ("absmax", torch.zeros(299, dtype=torch.uint8), "300 .*got 299"),
        ("absmax", torch.zeros(300), "uint8.*got 300 of torch.float32"),
        ("nested_absmax", torch.zeros(1), "2 .*got 1"),
        ("nested_absmax", torch.zeros(2, dtype=torch.bfloat16), "float32.*bfloat16"),
        ("quant_map", torch.linspace(-1, 1, 16), "quant_map must be the 16 levels"),
        ("quant_map", torch.zeros(15), "quant_map must be the 16 levels"),
        ("nested_quant_map", torch.zeros(255), "nested_quant_map must hold 256"),
        ("nested_quant_map", torch.full((256,), torch.nan), "nested_quant_map must hold finite levels"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(suffix: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_bnb_state_dict(damaged(**{suffix: tensor}), NAME)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '"x"', "[" * 100_000, "\xff"],
    ids=["empty", "open", "list", "null", "string", "deep", "latin"],
)
def test_a_quant_state_that_is_no_json_object_is_named(text: str) -> None:
    tensors = damaged()
    tensors[STATE] = torch.tensor(list(text.encode("latin-1")), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"quant_state\.bitsandbytes__nf4 must hold (JSON|a JSON object)") as caught:
        from_bnb_state_dict(tensors, NAME)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_type", "fp4"),
        ("quant_type", ["nf4"]),
        ("blocksize", 48),
        ("blocksize", 64.0),
        ("blocksize", "64"),
        ("blocksize", [64]),
        ("dtype", "int8"),
        ("dtype", ["float32"]),
        ("dtype", None),
        ("shape", None),
        ("shape", []),
        ("shape", [200, -96]),
        ("shape", [200, 96.0]),
        ("shape", [True, 96]),
        ("nested_blocksize", 128),
        ("nested_blocksize", 256.0),
        ("nested_dtype", "float16"),
        ("nested_offset", None),
        ("nested_offset", "0.5"),
        ("nested_offset", float("nan")),
        ("nested_offset", float("inf")),
        ("nested_offset", 1e39),
        ("nested_offset", 10**400),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_field_with_a_wrong_value_is_named(field: str, value: object) -> None:
    tensors = damaged()
    state = json.loads(text_of(tensors[STATE])) | {field: value}
    tensors[STATE] = as_bytes(json.dumps(state))
    with pytest.raises(ValueError, match=field):
        from_bnb_state_dict(tensors, NAME)


@pytest.mark.parametrize("field", ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset"])
def test_a_field_that_is_absent_is_named(field: str) -> None:
    tensors = damaged()
    state = json.loads(text_of(tensors[STATE]))
    del state[field]
    tensors[STATE] = as_bytes(json.dumps(state))
    with pytest.raises(ValueError, match=field):
        from_bnb_state_dict(tensors, NAME)


def test_no_quant_state_or_two_of_them_is_an_error() -> None:
    without = damaged()
    state = without.pop(STATE)
    with pytest.raises(ValueError, match=r"exactly one of .*found 0"):
        from_bnb_state_dict(without, NAME)
    both = damaged() | {f"{NAME}.quant_state.bitsandbytes__fp4": state}
    with pytest.raises(ValueError, match=r"exactly one of .*found 2"):
        from_bnb_state_dict(both, NAME)


WITHOUT_PEERS = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"bitsandbytes", "transformers", "peft", "trl", "accelerate", "scipy"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
try:
    import bitsandbytes
except ImportError:
    pass
else:
    sys.exit("the blocker does not block")

from safetensors.torch import load_file, save_file
from quant import dequantize, from_bnb_state_dict, to_bnb_state_dict
q = from_bnb_state_dict(load_file(sys.argv[1]), "w")
save_file(to_bnb_state_dict(q, "w") | {"dequantized": dequantize(q)}, sys.argv[2])
"""


def test_files_are_read_and_written_with_bitsandbytes_and_transformers_absent(tmp_path: Path) -> None:
    q: QuantizedTensor = quantize(torch.randn(64, 96).bfloat16())
    save_file(to_bnb_state_dict(q, "w"), tmp_path / "in")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", WITHOUT_PEERS, tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "out")
    assert torch.equal(written.pop("dequantized"), dequantize(q))
    stored = load_file(tmp_path / "in")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in stored.items())

"""save_model: a folder that transformers loads. config.json, weights in safetensors, the tokenizer's files.

Linear layers in 4 bits are written as bitsandbytes' (quant/bnb_format.py), and config.json gets the
`quantization_config` by which transformers knows them. Above `max_shard_bytes` the weights go into
model-00001-of-0000N.safetensors and so on, with an index that names the file of each tensor. A tied head is not stored.
The folder is written aside and renamed when it is whole.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lora import LinearNF4
from lora.adapters import AdapterLayer
from lora.attach import HEAD
from lora.files import written_aside
from quant import to_bnb_state_dict
from quant.bnb_format import to_quantization_config

from .decoder import Decoder
from .safetensors_format import INDEX, SINGLE
from .tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000


def save_model(
    model: Decoder, folder: str | Path, *, tokenizer: Tokenizer | None = None, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model in the dtypes and the 4-bit codes it has. A model folder that is there already is replaced.

    Raises ValueError when a layer wears an adapter, when layers are in 4 bits of several types or of one that
    bitsandbytes lacks, and when `folder` holds something else than a model; OSError when it cannot be written.
    """
    folder = Path(folder)
    check_target(folder)
    worn = [name for name, module in model.named_modules() if isinstance(module, AdapterLayer)]
    if worn:
        raise ValueError(f"save_model writes models without adapters: {worn[0]} wears one; save or merge the adapter")
    raw = model.config.to_hf() | {"torch_dtype": str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")}
    raw["tie_word_embeddings"] = (
        getattr(model.lm_head, "weight", None) is model.model.embed_tokens.weight
    )  # as they are
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, LinearNF4)}
    if quantized:
        raw["quantization_config"] = _quantization_config(model, quantized)
    tensors = _dense_tensors(model, quantized)
    for name, layer in quantized.items():
        tensors |= {
            key: tensor.contiguous() for key, tensor in to_bnb_state_dict(layer.quantized, f"{name}.weight").items()
        }
    with written_aside(folder) as aside:
        _write_json(aside / "config.json", raw)
        _write_weights(tensors, aside, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(aside)


def check_target(folder: str | Path) -> None:
    """Raises ValueError when `folder` holds something else than a model: it would be lost."""
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already and is no model folder; it will not be replaced")


def _dense_tensors(model: Decoder, quantized: dict[str, LinearNF4]) -> dict[str, Tensor]:
    """Every parameter but the bytes of 4-bit layers; a tied one once."""
    return {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in quantized or name.endswith(".bias")
    }


def _quantization_config(model: Decoder, quantized: dict[str, LinearNF4]) -> dict[str, Any]:
    """By default transformers takes every linear layer but the head to be in 4 bits: any other choice is listed."""
    frames = [layer.quantized for layer in quantized.values()]
    types = sorted({q.quant_type for q in frames})
    if len(types) > 1:
        raise ValueError(f"save_model writes 4-bit layers of one type, got {' and '.join(types)}")
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    skipped = None if dense == [HEAD] else dense
    return to_quantization_config(types[0], all(q.double_quant for q in frames), model.compute_dtype, skipped)


def _write_weights(tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in order, as many a shard as fit; a larger tensor has one to itself."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

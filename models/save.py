"""save_model: a folder that transformers loads. config.json, weights in safetensors, the tokenizer's files.

Above `max_shard_bytes` the weights go into model-00001-of-0000N.safetensors and so on, with an index that names the
file of each tensor. A tied head is not stored. The folder is written aside and renamed when it is whole.
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from lora import LinearNF4
from lora.adapters import AdapterLayer
from lora.files import written_aside

from .decoder import Decoder
from .safetensors_format import INDEX, SINGLE
from .tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000


def save_model(
    model: Decoder, folder: str | Path, *, tokenizer: Tokenizer | None = None, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a dense model, in the dtypes it has. A model folder that is there already is replaced.

    Raises ValueError when a layer is in 4 bits or wears an adapter, and when `folder` holds something else than a
    model; OSError when it cannot be written.
    """
    folder = Path(folder)
    _check_dense(model)
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already and is no model folder; it will not be replaced")
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    raw = model.config.to_hf() | {"torch_dtype": str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")}
    raw["tie_word_embeddings"] = model.lm_head.weight is model.model.embed_tokens.weight  # merging can untie them
    with written_aside(folder) as aside:
        _write_json(aside / "config.json", raw)
        _write_weights(tensors, aside, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(aside)


def _check_dense(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            raise ValueError(f"save_model writes dense models: {name} wears an adapter; save or merge the adapter")
        if isinstance(module, LinearNF4):
            raise ValueError(f"save_model writes dense models: {name} is in 4 bits; load it without quantize, or merge")


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

"""load_model: a Decoder from any source, filled tensor by tensor, a few rows at a time, in 4 bits if asked.

    source → checkpoint (config, names, shapes)       files are opened, nothing is read
           → Decoder on the meta device               shapes without memory
           → names and shapes compared                every fault is found before the first weight is read
           → each tensor: rows → dtype → its place, or rows → dtype → 4-bit codes, or stored 4-bit codes as they are

What lies in memory beyond the finished model is a few row chunks of 4 MB: with `quantize` no dense layer ever
exists whole. Rows are cast to `dtype` before they are quantized, so that the codes are those of the dense model.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

import kernels
from lora import LinearNF4
from lora.attach import HEAD, replace_module
from lora.config import matches
from quant import BLOCKSIZES, QuantizedTensor
from quant.blockwise import double_quantize

from .config import DecoderConfig
from .decoder import Decoder
from .gguf_checkpoint import GGUFCheckpoint
from .safetensors_format import SafetensorsFolder, and_more
from .source import locate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANT_TYPES = ("nf4", "fp4")
CHUNK = 1 << 20  # elements of a row chunk
UNUSED = ".rotary_emb.inv_freq"  # written by old versions of transformers, recomputed here


class Checkpoint(Protocol):
    """What a file format offers."""

    config: DecoderConfig
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    quant_type: str | None
    """of the weights that are stored in 4 bits; None: there are none"""

    def where(self, name: str) -> str:
        """The file and tensor, for errors."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop (elements, of a 1-D tensor), in any float dtype; only valid until the next call."""

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor is stored in 4 bits."""

    def read_quantized(self, name: str) -> QuantizedTensor | None:
        """The stored 4-bit codes, copied out of the file; None for a tensor that is dense."""


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    head: str | None = None,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A Decoder in eval mode from a Hugging Face folder, a .gguf file, a hub id or a built-in name (smollm2-135m).

    dtype: of every dense parameter, and of what 4-bit weights dequantize to; None keeps the checkpoint's (fp32 for a
    GGUF file in block formats). quantize: None, nf4 or fp4, for every linear layer but lm_head. head: bf16, nf4
    or fp4 for lm_head, the half of what decoding a token reads in a small model; None leaves it as it is, and tied
    where it was. Such a head is a copy: embeddings stay.
    A folder that is in bitsandbytes' 4 bits already is taken as it is: its codes, its block sizes, its dense layers.
    Raises ValueError, in one line naming the file and the tensor, when the source is missing, damaged, not supported,
    or does not fit its config, when it is in 4 bits of another type than `quantize`, and when a weight is NaN or
    infinite.
    """
    _check_options(dtype, quantize, head, blocksize)
    path = locate(source)
    checkpoint: Checkpoint = SafetensorsFolder(path) if path.is_dir() else GGUFCheckpoint(path)
    dtype = dtype or _supported(checkpoint.dtype, f"{path}: ")
    if quantize is not None and checkpoint.quant_type not in (None, quantize):
        raise ValueError(f"{path}: is in {checkpoint.quant_type} already, and cannot be loaded in {quantize}")
    _check_sizes(checkpoint)
    with torch.device("meta"):
        model = Decoder(checkpoint.config)
    _check_tensors(model, checkpoint)
    stored_in_4_bits = checkpoint.quant_type is not None
    for name, module in list(model.named_modules()):
        weight, is_linear = f"{name}.weight", isinstance(module, nn.Linear)
        if is_linear and (checkpoint.is_quantized(weight) or (quantize and name != HEAD and not stored_in_4_bits)):
            if stored_in_4_bits:
                q = _stored_quantized(checkpoint, weight, dtype, device)
            else:
                q = _read_quantized(checkpoint, weight, dtype, str(quantize), blocksize, double_quant, device)
            bias = None if module.bias is None else _read_dense(checkpoint, f"{name}.bias", dtype, device)
            replace_module(model, name, LinearNF4(q, bias))
            continue
        if name == HEAD and checkpoint.config.tie_word_embeddings:
            continue
        for leaf, _ in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, nn.Parameter(_read_dense(checkpoint, f"{name}.{leaf}", dtype, device)))
    model.tie_weights()
    if head == "bf16" and isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.bfloat16, copy=True))
    elif head is not None and isinstance(model.lm_head, nn.Linear):
        options = {"quant_type": head, "blocksize": blocksize, "double_quant": double_quant}
        replace_module(model, HEAD, LinearNF4.from_weight(model.lm_head.weight.detach(), **options))  # type: ignore[arg-type]
    return model.eval()


def load_weight(source: str | Path, layer: str) -> tuple[str, Tensor | QuantizedTensor]:
    """(path, weight) of one linear layer, without the rest of the model: fp32 (N, K), or the 4-bit codes it has.

    layer: its path, or the end of one (layers.3.mlp.up_proj). Raises ValueError where none, or more than one, ends so.
    """
    path = locate(source)
    checkpoint: Checkpoint = SafetensorsFolder(path) if path.is_dir() else GGUFCheckpoint(path)
    with torch.device("meta"):
        linear = [name for name, m in Decoder(checkpoint.config).named_modules() if isinstance(m, nn.Linear)]
    found = [name for name in linear if matches([layer], name) and f"{name}.weight" in checkpoint.shapes]
    if len(found) != 1:
        known = f"{len(found)} do, the first {found[0]}" if found else f"none does: try {linear[0]}"
        raise ValueError(f"{source}: one linear layer's path must end in {layer!r}, and {known}")
    weight = f"{found[0]}.weight"
    if checkpoint.is_quantized(weight):
        return found[0], _stored_quantized(checkpoint, weight, torch.float32, "cpu")
    return found[0], _read_dense(checkpoint, weight, torch.float32, "cpu")


def _check_options(dtype: torch.dtype | None, quantize: str | None, head: str | None, blocksize: int) -> None:
    if dtype is not None:
        _supported(dtype)
    for name, value, known in (("quantize", quantize, QUANT_TYPES), ("head", head, ("bf16", *QUANT_TYPES))):
        if value not in (None, *known):
            raise ValueError(f"{name} must be None, {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize}")


def _supported(dtype: torch.dtype, where: str = "") -> torch.dtype:
    if dtype not in DTYPES:
        raise ValueError(f"{where}dtype must be float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}")
    return dtype


def _check_sizes(checkpoint: Checkpoint) -> None:
    """The sizes of the config are the file's: a damaged one could make a model of 2³¹ layers, which never ends."""
    config, shapes = checkpoint.config, checkpoint.shapes
    expected = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.layers.0.self_attn.q_proj.weight": (config.num_attention_heads * config.head_dim, config.hidden_size),
        "model.layers.0.mlp.gate_proj.weight": (config.intermediate_size, config.hidden_size),
    }
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(f"{checkpoint.where(name)} is missing")
        _check_shape(checkpoint, name, shape)
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    if len(layers) != config.num_hidden_layers:
        where = checkpoint.where("model.layers")
        raise ValueError(f"{where}: the config has {config.num_hidden_layers} layers, the file {len(layers)}")


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    if checkpoint.shapes[name] != shape:
        raise ValueError(f"{checkpoint.where(name)} has shape {checkpoint.shapes[name]}, the config needs {shape}")


def _check_tensors(model: Decoder, checkpoint: Checkpoint) -> None:
    """The checkpoint holds the model's tensors, in its shapes, and no others."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = sorted(expected.keys() - checkpoint.shapes.keys())
    if missing:
        raise ValueError(f"{checkpoint.where(missing[0])} is missing{and_more(missing)}")
    head = f"{HEAD}.weight"
    extra = {name for name in checkpoint.shapes if name not in expected and not name.endswith(UNUSED)}
    if head in extra:
        _check_tied_head(checkpoint, head)
        extra.remove(head)
    if extra:
        names, family = sorted(extra), model.config.architecture
        raise ValueError(f"{checkpoint.where(names[0])} does not belong to a {family}{and_more(names)}")
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, shape in expected.items():
        _check_shape(checkpoint, name, shape)
        if checkpoint.is_quantized(name) and name not in linear:
            raise ValueError(f"{checkpoint.where(name)} is in 4 bits, which only linear layers can be")


def _check_tied_head(checkpoint: Checkpoint, head: str) -> None:
    """A tied checkpoint may store its head as well, when it equals the embeddings."""
    embeddings = "model.embed_tokens.weight"
    if checkpoint.is_quantized(head) or checkpoint.is_quantized(embeddings):
        raise ValueError(f"{checkpoint.where(head)} is in 4 bits, which a head tied to its embeddings cannot be")
    same = checkpoint.shapes[head] == checkpoint.shapes[embeddings]
    for start, stop in _row_chunks(checkpoint.shapes[embeddings], 1):
        same = same and torch.equal(
            checkpoint.read_rows(head, start, stop).clone(), checkpoint.read_rows(embeddings, start, stop)
        )
    if not same:
        raise ValueError(f"{checkpoint.where(head)} differs from {embeddings}, but tie_word_embeddings is true")


def _row_chunks(shape: tuple[int, ...], multiple: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of chunks of rows, about CHUNK elements each, `multiple` dividing all their sizes but the last."""
    row = shape[1] if len(shape) == 2 else 1
    step = max(CHUNK // row // multiple, 1) * multiple
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _chunks(
    checkpoint: Checkpoint, name: str, multiple: int, dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, rows in dtype). Raises ValueError for NaN and infinity, stored or made by the cast."""
    for start, stop in _row_chunks(checkpoint.shapes[name], multiple):
        stored = checkpoint.read_rows(name, start, stop)
        rows = stored.to(device, dtype)
        if not torch.isfinite(torch.stack(torch.aminmax(rows))).all():
            overflow = torch.isfinite(stored).all()
            cause = f", since {str(dtype).removeprefix('torch.')} cannot hold its values" if overflow else ""
            raise ValueError(f"{checkpoint.where(name)} holds NaN or infinity{cause}")
        yield start, rows


def _read_dense(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    out = torch.empty(checkpoint.shapes[name], dtype=dtype, device=device)
    for start, rows in _chunks(checkpoint, name, 1, dtype, device):
        out[start : start + len(rows)] = rows
    return out


def _stored_quantized(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device | str
) -> QuantizedTensor:
    """The codes of the file, which are to dequantize to `dtype`."""
    q = checkpoint.read_quantized(name)
    assert q is not None
    if q.scales().abs().max() > torch.finfo(dtype).max:
        raise ValueError(f"{checkpoint.where(name)} has scales that {str(dtype).removeprefix('torch.')} cannot hold")
    return replace(q, dtype=dtype).to(device)


def _read_quantized(
    checkpoint: Checkpoint,
    name: str,
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    double_quant: bool,
    device: torch.device | str,
) -> QuantizedTensor:
    """kernels.quantize of the whole weight, to the bit, a chunk at a time: blocks do not know one another.

    Double quantization does: its offset is the mean of all scales, so it waits for the last chunk.
    """
    N, K = checkpoint.shapes[name]
    packed = torch.empty(-(-N * K // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-N * K // blocksize), dtype=torch.float32, device=device)
    whole_blocks = blocksize // math.gcd(K, blocksize)  # the fewest rows that end where a block ends
    for start, rows in _chunks(checkpoint, name, whole_blocks, dtype, device):
        q = kernels.quantize(rows, quant_type=quant_type, blocksize=blocksize, double_quant=False)
        packed[start * K // 2 :][: q.packed.numel()] = q.packed
        absmax[start * K // blocksize :][: q.n_blocks] = q.scales()
    whole = replace(q, packed=packed, absmax=absmax, shape=(N, K))
    return double_quantize(whole) if double_quant else whole

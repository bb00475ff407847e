"""qlora quantize: a model as a 4-bit folder, which transformers and bitsandbytes load, and every command here.

The model is read and quantized tensor by tensor: what it takes is the memory of the 4-bit model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from lora import LinearNF4, count_parameters
from models import load_model, load_tokenizer, save_model
from models.save import check_target

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class QuantizeArgs:
    """Write a model as a 4-bit folder, in bitsandbytes' format. One that is in 4 bits already keeps its codes."""

    model: Annotated[str, tyro.conf.Positional]
    """Built-in name, Hugging Face folder, .gguf file, or hub id."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write; a model folder that is there already is replaced."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 levels: quantiles of a normal distribution, or 4-bit floats."""
    blocksize: int = 64
    """Weights that share one scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096."""
    double_quant: bool = True
    """Quantize the scales in turn, to 8 bits: 4.127 bits a weight in place of 4.5."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Of the dense part (embeddings, norms, head), and of what the 4-bit weights stand for; keep: the model's own."""


def run(args: QuantizeArgs) -> None:
    check_target(args.out)
    tokenizer = load_tokenizer(args.model)
    model = load_model(
        args.model,
        dtype=DTYPES[args.dtype],
        quantize=args.quant_type,
        blocksize=args.blocksize,
        double_quant=args.double_quant,
    )
    save_model(model, args.out, tokenizer=tokenizer)
    layers = [module.quantized for module in model.modules() if isinstance(module, LinearNF4)]
    q, total = layers[0], count_parameters(model)[1]
    in_4_bits = sum(q.numel for q in layers)
    bits = 8 * sum(q.nbytes for q in layers) / in_4_bits
    form = f"{q.quant_type}, blocks of {q.blocksize}" + (", double-quantized" if q.double_quant else "")
    print(f"{len(layers)} linear layers in {form}: {in_4_bits:,} of {total:,} weights, {bits:.3f} bits each")
    written = sum(path.stat().st_size for path in Path(args.out).glob("*.safetensors"))
    dtype = str(model.compute_dtype).removeprefix("torch.")
    print(f"{args.out}: {written / 1e6:.1f} MB of weights, the dense part in {dtype}")

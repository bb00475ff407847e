"""A model and its tokenizer, ready to answer: what generate, chat, probe and inspect share.

An adapter is spoken to in the chat template that it was trained with, which lies in its folder, and stops on the tokens
that lie there. --chat-template says otherwise. Where it is not the model's own, which one is used is told on stderr.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from data.formats import describe
from lora import load_adapter
from models import Decoder, Tokenizer, load_model, load_tokenizer


@dataclass(frozen=True)
class ModelArgs:
    """Which model, and how it is held."""

    model: str = "smollm2-135m"
    """Built-in name, Hugging Face folder, .gguf file, or hub id."""
    adapter: str | None = None
    """Adapter folder in PEFT's format, for example runs/first/adapter."""
    chat_template: str | None = None
    """chatml, llama-3, vicuna, chatgpt, alpaca, plain, model (its own) or a Jinja file; by default the one saved with
    the adapter, else the model's own."""
    quantize: Literal["none", "nf4", "fp4"] = "none"
    """Hold the linear layers in 4 bits, as QLoRA training did."""
    head: Literal["dense", "bf16", "nf4", "fp4"] = "dense"
    """Hold the output layer in fewer bits: answers come faster, from rounded weights (README says what that costs)."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dense weights and activations."""


def load(args: ModelArgs) -> tuple[Decoder, Tokenizer]:
    """The model in eval mode, with its adapter, and its tokenizer. Raises ValueError for what cannot be loaded."""
    tokenizer, whose = with_chat(load_tokenizer(args.model), args.chat_template, args.adapter)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    quantize, head = (None if form in ("none", "dense") else form for form in (args.quantize, args.head))
    model = load_model(args.model, dtype=dtype, quantize=quantize, head=head)
    if args.adapter is not None:
        load_adapter(model, args.adapter)
    if whose:
        print(f"{describe(tokenizer)}; {whose}", file=sys.stderr)
    return model.eval(), tokenizer


def with_chat(tokenizer: Tokenizer, chat_template: str | None, adapter: str | None) -> tuple[Tokenizer, str]:
    """The tokenizer with the template to use, and whose it is; "" for the model's own."""
    if chat_template is not None:
        return tokenizer.with_chat_template(chat_template), "from --chat-template"
    if adapter is not None:
        saved = tokenizer.with_chat_of(adapter)
        if (saved.chat_template, saved.eos_ids) != (tokenizer.chat_template, tokenizer.eos_ids):
            return saved, f"saved with {adapter}"
    return tokenizer, ""

"""models: a decoder and what feeds it. Files in, tokens in; logits, hidden states and completions out.

source ──load──▶ Decoder ──generate──▶ Completion            text ◀──Tokenizer──▶ ids
"""

from .config import DecoderConfig
from .decoder import Decoder
from .generate import Completion, generate
from .kv_cache import KVCache
from .load import load_model
from .save import save_model
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Completion",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "Tokenizer",
    "generate",
    "load_model",
    "load_tokenizer",
    "save_model",
]

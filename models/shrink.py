"""shrink: a smaller student from a model, by leaving layers out.

    x → layer 0 → layer 2 → layer 4 → … → norm → head          what stays keeps its weights

Each layer adds to the stream of its input, so that a model without some of them still runs, badly at first; what it
lost is then taught by the whole model (DistilBERT, arXiv 1910.01108, starts from every other layer of its teacher).
Embeddings, head and hidden size stay, so the vocabulary does too. Left out: narrower layers.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lora.adapters import AdapterLayer

from .decoder import Decoder


def evenly(layers: int, keep: int) -> list[int]:
    """`keep` layer numbers spread over `layers`, the first and the last among them (one: the first).

    Raises ValueError for a keep below 1 or above `layers`.
    """
    if not 1 <= keep <= layers:
        raise ValueError(f"a model of {layers} layers can keep between 1 and {layers} of them, got {keep}")
    return [round(i * (layers - 1) / max(1, keep - 1)) for i in range(keep)]


def shrink(model: Decoder, keep: int | Sequence[int]) -> Decoder:
    """The same model with these layers alone: a number of them, evenly spread, or their numbers in order.

    Changes `model` and returns it. Raises ValueError for layers that it lacks or that are not in order, and for a model
    that wears an adapter.
    """
    n = model.config.num_hidden_layers
    kept = evenly(n, keep) if isinstance(keep, int) else list(keep)
    if not kept or kept[0] < 0 or kept[-1] >= n or kept != sorted(set(kept)):
        raise ValueError(f"layers to keep must rise and lie between 0 and {n - 1}, got {kept}")
    worn = next((name for name, module in model.named_modules() if isinstance(module, AdapterLayer)), None)
    if worn:
        raise ValueError(f"a model is shrunk before it gets an adapter: {worn} wears one")
    config = model.config
    model.config = replace(
        config,
        num_hidden_layers=len(kept),
        windows=tuple(config.windows[i] for i in kept) if config.windows else (),
        rope_layers=tuple(config.rope_layers[i] for i in kept) if config.rope_layers else (),
    )
    model.config.check(f"a model of layers {kept}")
    layers = [model.model.layers[i] for i in kept]
    for number, layer in enumerate(layers):
        layer.self_attn.layer = number  # type: ignore[union-attr]  # its place in a cache
    model.model.layers = nn.ModuleList(layers)
    return model

"""Decoder: the Llama architecture (arXiv 2302.13971) and its kin, under the names of Hugging Face's checkpoints.

    x  = embed_tokens[ids]
    x  = x + o_proj(attention(rope(q_proj(h)), rope(k_proj(h)), v_proj(h)))       h = RMSNorm(x), in every layer
    x  = x + down_proj(silu(gate_proj(h)) ⊙ up_proj(h))                           h = RMSNorm(x)
    logits = lm_head(RMSNorm(x))

    RMSNorm(x) = x / √(mean(x²) + ε) ⊙ g                                          (arXiv 1910.07467, eq. 4)

What the families do otherwise (families.py) is four settings of a layer: biases; q and k under an RMSNorm of each head
before rope; a sliding window; no rope.

    B batch, T tokens, D hidden_size, V vocabulary, H heads, Kv key-value heads, Dh head_dim

Precision is explicit, there is no autocast. Activations are in `compute_dtype`; a dense weight of another dtype is
cast where it is used, so that fp32 master weights run in bf16 by setting compute_dtype alone. Norms and rotary angles
are computed in fp32, and logits come back in fp32.

Left out: dropout (these models have none), and every other family.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from lora import LoRALinear, captured_adapters
from lora.linear import base_weight
from lora.saved_module import in_use

from .attention import (
    Band,
    Runs,
    band,
    cached_attention,
    causal_attention,
    document_runs,
    prefix_runs,
    rope_frequencies,
    rope_scale,
    rope_tables,
)
from .config import DecoderConfig
from .elementwise import add, apply_rope, rms_norm, swiglu
from .kv_cache import KVCache
from .recompute import recomputed


class Shared(NamedTuple):
    """What every layer of one forward uses."""

    cos: Tensor
    sin: Tensor
    runs: Runs | None
    """the documents, where rows hold several"""
    bands: dict[int | None, Band]
    """by window, for the windows that are shorter than the text"""
    cache: KVCache | None = None
    masks: dict[int | None, Tensor | None] | None = None
    """by window, over the cache; None when the new tokens attend to one another alone: no cache, or an empty one"""
    lean: bool = False
    """keep no activation for backward that is cheap to compute again (recompute.py)"""
    prefixes: list[int | None] | None = None
    """of each of the runs, the run that comes before it, where documents share their beginning"""


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) for a dense, 4-bit or LoRA layer, (…, K) → (…, N) in x.dtype."""
    if isinstance(layer, nn.Linear) and layer.weight.dtype != x.dtype:
        return kernels.linear(x, layer.weight, layer.bias)
    return layer(x)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, D) in x.dtype."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        D, Dh, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim = layer, Dh
        self.window, self.has_rope = config.window(layer), config.has_rope(layer)
        self.q_proj = nn.Linear(D, config.num_attention_heads * Dh, bias=bias or config.qkv_bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias=bias or config.qkv_bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * Dh, bias=bias or config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * Dh, D, bias=bias)
        self.q_norm = RMSNorm(Dh, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(Dh, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        q = self._turned(self.q_proj, self.q_norm, x, shared)  # (B, T, H, Dh)
        k = self._turned(self.k_proj, self.k_norm, x, shared)  # (B, T, Kv, Dh)
        v = project(self.v_proj, x).view(k.shape)
        if shared.cache is not None:
            all_k, all_v = shared.cache.write(self.layer, k, v)
        if shared.masks is None:
            y = causal_attention(q, k, v, shared.runs, shared.bands.get(self.window), shared.prefixes)
        else:
            y = cached_attention(q, all_k, all_v, shared.masks[self.window])
        return project(self.o_proj, y.reshape(*x.shape[:2], -1))

    def _turned(self, layer: nn.Module, norm: nn.Module | None, x: Tensor, shared: Shared) -> Tensor:
        """q or k: projected, cut into heads, normed and turned where the layer does so."""
        heads = project(layer, x).view(*x.shape[:2], -1, self.head_dim)
        if norm is not None:
            heads = norm(heads)
        return apply_rope(heads, shared.cos, shared.sin) if self.has_rope else heads


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        gate, up = project(self.gate_proj, x), project(self.up_proj, x)
        product = swiglu(gate, up)
        with recomputed(product, lambda: swiglu(gate, up), when=shared.lean):
            return project(self.down_proj, product)


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        # the norms of now: by the time of backward another adapter may be on
        first, second = in_use(self.input_layernorm), in_use(self.post_attention_layernorm)
        h = first(x)
        with recomputed(h, lambda: first(x), when=shared.lean):
            y = add(x, self.self_attn(h, shared))
        h = second(y)
        with recomputed(h, lambda: second(y), when=shared.lean):
            return add(y, self.mlp(h, shared))


class Body(nn.Module):
    """Everything below the head; `model` in checkpoints."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class HeadLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) → fp32 (…, V). In decoding, where it is much of the work, by the C kernels, and not rounded."""
        return kernels.linear(x, self.weight, self.bias, out_dtype=torch.float32)


class Decoder(nn.Module):
    """A decoder of any family. `gradient_checkpointing` trades one more forward of every layer for its activations."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.model = Body(config)
        self.lm_head = HeadLinear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
        self.tie_weights()
        self.gradient_checkpointing = False
        self._compute_dtype: torch.dtype | None = None
        self._frequencies = rope_frequencies(config)  # a plain attribute: no cast of the module may round it

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the activations: that of the embeddings, unless set."""
        return self._compute_dtype or self.model.embed_tokens.weight.dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self._compute_dtype = dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def tie_weights(self) -> None:
        """With tie_word_embeddings, lm_head.weight is the Parameter embed_tokens.weight."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        prefix_ids: Tensor | None = None,
        cache: KVCache | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Logits fp32 (B, T, V), or the hidden states under the head (B, T, D) with return_hidden.

        input_ids int64 (B, T). segment_ids int64 (B, T): 0 is padding, a document is one stretch of an id ≥ 1; all
        one document by default. position_ids int64 (B, T): by default they count from 0 in every document, or go on
        from what the cache holds. prefix_ids int64 (B, T): 0, or the id of an earlier document of the row that the
        token's document continues: its tokens attend to all of that one too, and need position_ids that go on from it.
        What comes out at padding is unspecified.
        With a cache, padding must be on the right; the tokens are added to the cache. Raises ValueError for
        segment_ids that break these rules, and when the cache is full.
        """
        shared = self._shared(input_ids, position_ids, segment_ids, cache)
        if prefix_ids is not None:
            if cache is not None or segment_ids is None or shared.runs is None:
                raise ValueError("prefix_ids need segment_ids with several documents in a row, and no cache")
            shared = shared._replace(prefixes=prefix_runs(shared.runs, segment_ids, prefix_ids))
        x = self.model.embed_tokens(input_ids).to(self.compute_dtype)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        context_fn = self._captured() if recompute else None
        for layer in self.model.layers:
            if context_fn is not None:
                x = checkpoint(layer, x, shared, use_reentrant=False, context_fn=context_fn)
            else:
                x = layer(x, shared)
        hidden = self.model.norm(x)
        return hidden if return_hidden else self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head alone: (…, D) → fp32 (…, V)."""
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    def head(self) -> kernels.Head:
        """The head as linear_cross_entropy takes it: its weight, bias, and the adapters that are on now.

        Raises ValueError in training when such an adapter has dropout: it would need an input of its own.
        """
        layer: nn.Module = self.lm_head
        if isinstance(layer, LoRALinear):
            if layer.drops and torch.is_grad_enabled():
                raise ValueError("an adapter on lm_head cannot train with dropout: set it to 0, or leave lm_head out")
            return kernels.Head(base_weight(layer.base_layer), tuple(layer.terms()), layer.bias)
        layer = in_use(layer)
        return kernels.Head(base_weight(layer), (), layer.bias)  # type: ignore[arg-type]

    def _shared(
        self, input_ids: Tensor, position_ids: Tensor | None, segment_ids: Tensor | None, cache: KVCache | None
    ) -> Shared:
        runs = None if segment_ids is None else document_runs(segment_ids)
        only_new = cache is None or cache.used == 0
        bands = self._bands(input_ids.shape[1]) if only_new else {}
        if bands and position_ids is not None:
            _check_steps(position_ids, segment_ids)
        if cache is None:
            if position_ids is None:
                position_ids = document_positions(input_ids, segment_ids if runs else None)
            lean = torch.is_grad_enabled() and not self.gradient_checkpointing
            return Shared(*self._rope(position_ids), runs, bands, lean=lean)
        continues = position_ids is None and runs is None and (segment_ids is None or cache.used == 0)
        next_positions, next_segments = cache.next_tokens(input_ids.shape[1])
        if position_ids is None:
            position_ids = document_positions(input_ids, segment_ids) if runs else next_positions
        segments = next_segments if segment_ids is None else segment_ids
        kept = _kept(input_ids, segment_ids)
        cache.extend(position_ids, segments, kept, continues)
        masks = None if only_new else cache.masks(position_ids, segments, self.compute_dtype)
        return Shared(*self._rope(position_ids), runs, bands, cache, masks)

    def _rope(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return rope_tables(position_ids, self._frequencies.to(position_ids.device), rope_scale(self.config))

    def _bands(self, T: int) -> dict[int | None, Band]:
        """For the windows shorter than a text of T tokens."""
        windows = {window for window in self.config.windows if window is not None and window < T}
        return {window: band(window, dtype=self.compute_dtype, device=self.device) for window in windows}

    def _captured(self) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
        """For checkpoint: backward recomputes with the backend and the adapters of the forward."""
        entered_again = (kernels.captured_backend(), captured_adapters(self))

        @contextmanager
        def as_in_forward() -> Iterator[None]:
            with ExitStack() as stack:
                for enter in entered_again:
                    stack.enter_context(enter())
                yield

        return lambda: (nullcontext(), as_in_forward())


def document_positions(input_ids: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Positions that count from 0 in every stretch of equal segment ids: int64, (B, T); (1, T) without segment_ids."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if segment_ids is None:
        return index
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def _check_steps(position_ids: Tensor, segment_ids: Tensor | None) -> None:
    """Raises ValueError where positions jump inside a document: there a window would not be a stretch of the row."""
    jumps = position_ids.diff(dim=1) != 1
    if segment_ids is not None:
        jumps = jumps & (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    if jumps.any():
        row, column = jumps.nonzero()[0].tolist()
        raise ValueError(
            "with a sliding window, position_ids must go up by one within a document, "
            f"got {position_ids[row, column + 1].item()} at row {row}, column {column + 1}"
        )


def _kept(input_ids: Tensor, segment_ids: Tensor | None) -> list[int]:
    """Tokens of each row that are not padding. Raises ValueError when padding has a token on its right."""
    B, T = input_ids.shape
    if segment_ids is None:
        return [T] * B
    real = segment_ids != 0
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError("with a cache, padding must be on the right of every row: segment_ids has a token after a 0")
    return real.sum(dim=1).tolist()

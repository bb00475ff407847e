"""KVCache: the keys and values of tokens already seen, so that a new token costs one token.

Each entry keeps its position and its document beside its key and value. What a query may attend to follows from
those two (`attention.allowed_pairs`), never from where an entry happens to lie, so that rows of unequal length,
prompts shared by several generations and rows that leave need no rule of their own.

    B rows, S entries a row, Kv key-value heads, Dh head_dim, T new tokens

Rows fill from the left, each to its own length: right padding is not kept, its place is written over by the next
token. Left out: a ring for sliding windows, and entries shared between rows (`repeat` copies).
"""

import torch
from torch import Tensor

from .attention import allowed_pairs
from .config import DecoderConfig


class KVCache:
    """Room for `capacity` tokens a row. `lengths` says how many each row holds."""

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        # zeros, since a masked entry still meets its value in 0 · v, and what lies in empty memory may be NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.positions = torch.zeros(batch_size, capacity, dtype=torch.int64, device=device)
        self.segments = torch.zeros(batch_size, capacity, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.lengths = [0] * batch_size
        self.one_document = True
        """Every row is one document at positions 0, 1, 2, …: then entries of a full row need no mask."""
        self._rows = torch.zeros(0)
        self._slots: Tensor | slice = slice(0)

    @property
    def used(self) -> int:
        """Entries of the longest row."""
        return max(self.lengths, default=0)

    def next_tokens(self, T: int) -> tuple[Tensor, Tensor]:
        """position_ids and segment_ids of T more tokens of every row's last document: int64 (B, T) each."""
        device = self.positions.device
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        last = (lengths - 1).clamp(min=0)
        positions = torch.where(lengths > 0, self.positions.gather(1, last) + 1, 0)
        segments = torch.where(lengths > 0, self.segments.gather(1, last), 1)
        return positions + torch.arange(T, device=device), segments.expand(-1, T)

    def extend(self, position_ids: Tensor, segment_ids: Tensor, new_lengths: list[int], one_document: bool) -> None:
        """Make room for T tokens: position_ids and segment_ids (B, T), of which row b keeps the first new_lengths[b].

        Called once a forward, before the layers write. one_document: whether these tokens continue each row's only
        document. Raises ValueError when a row would hold more than the capacity.
        """
        T = position_ids.shape[1]
        if self.used + T > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens a row, got {self.used} + {T}")
        device = self.positions.device
        if min(self.lengths) == self.used:
            self._slots = slice(self.used, self.used + T)
            self.positions[:, self._slots], self.segments[:, self._slots] = position_ids, segment_ids
        else:
            self._rows = torch.arange(len(self.lengths), device=device)[:, None]
            self._slots = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(T, device=device)
            self.positions[self._rows, self._slots] = position_ids
            self.segments[self._rows, self._slots] = segment_ids
        self.lengths = [old + new for old, new in zip(self.lengths, new_lengths, strict=True)]
        self.one_document = self.one_document and one_document

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v (B, T, Kv, Dh) of a layer; returns all of them, (B, Kv, S, Dh) with S = used."""
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(self._slots, slice):
            keys[:, :, self._slots], values[:, :, self._slots] = k.transpose(1, 2), v.transpose(1, 2)
        else:
            keys[self._rows, :, self._slots], values[self._rows, :, self._slots] = k, v
        return keys[:, :, : self.used], values[:, :, : self.used]

    def mask(self, position_ids: Tensor, segment_ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores of the tokens just made room for: (B, 1, T, S), or None when nothing is hidden."""
        T = position_ids.shape[1]
        if T == 1 and self.one_document and min(self.lengths) == self.used:
            return None
        positions, segments = self.positions[:, : self.used], self.segments[:, : self.used]
        allowed = allowed_pairs(position_ids, segment_ids, positions, segments)
        allowed |= (segment_ids == 0)[:, :, None]  # padding may see anything: a row of -inf alone would make NaN
        hidden = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)
        return hidden[:, None]

    def repeat(self, num_generations: int) -> None:
        """Each row becomes num_generations equal rows, next to one another."""
        rows = [row for row in range(len(self.lengths)) for _ in range(num_generations)]
        self.select(rows)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        if rows == list(range(len(self.lengths))):
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.positions.device)
        for stored in (self.keys, self.values):
            for layer, old in enumerate(stored):  # one layer at a time bounds the copy
                new = torch.zeros(len(rows), *old.shape[1:], dtype=old.dtype, device=old.device)
                new[:, :, : self.used] = old[:, :, : self.used].index_select(0, index)
                stored[layer] = new
        self.positions, self.segments = self.positions[index], self.segments[index]
        self.lengths = [self.lengths[row] for row in rows]

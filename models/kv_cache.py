"""KVCache: the keys and values of tokens already seen, so that a new token costs one token.

Each entry keeps its position and its document beside its key and value. What a query may attend to follows from
those two (`attention.allowed_pairs`), never from where an entry happens to lie, so that rows of unequal length,
prompts shared by several generations and rows that leave need no rule of their own.

The n-th token of a row lies in slot n mod size: a ring. Layers with a sliding window of W tokens have W slots, since
the W-th last token has been seen for the last time when the next one comes; their memory does not grow with the text.
The other layers have a slot for every token up to the capacity, and never come around.

    B rows, S entries a row, Kv key-value heads, Dh head_dim, T new tokens

Rows fill each to its own length: right padding is not kept. Left out: entries shared between rows (`repeat` copies).
"""

import torch
from torch import Tensor

from kernels.decode import Entries

from .attention import allowed_pairs
from .config import DecoderConfig


class Ring:
    """Where the entries of the layers of one window lie, and their positions and documents."""

    def __init__(self, window: int | None, size: int, batch_size: int, device: torch.device | str) -> None:
        self.window, self.size = window, size
        self.positions = torch.zeros(batch_size, size, dtype=torch.int64, device=device)
        self.segments = torch.zeros(batch_size, size, dtype=torch.int64, device=device)
        self.filled = 0
        """slots that some row uses"""
        self.old: slice | None = None
        """what the new tokens attend to beside themselves, where writing them first would lose some of it"""
        self.attended = (self.positions, self.segments)
        self._slots: slice | tuple[Tensor, Tensor, Tensor] = slice(0)

    def extend(self, position_ids: Tensor, segment_ids: Tensor, lengths: list[int], new_lengths: list[int]) -> None:
        """Room for T tokens after rows of these lengths, of which row b keeps the first new_lengths[b]."""
        T, longest = position_ids.shape[1], max(lengths)
        fits = longest + T <= self.size
        self.old = None if fits or T == 1 or longest == 0 else slice(self.filled)
        if self.old is not None:
            before = (self.positions[:, self.old], self.segments[:, self.old])
            self.attended = (torch.cat([before[0], position_ids], 1), torch.cat([before[1], segment_ids], 1))
        self._slots = self._places(T, lengths, new_lengths)
        self._put(self.positions, position_ids)
        self._put(self.segments, segment_ids)
        self.filled = min(longest + T, self.size)
        if self.old is None:
            self.attended = (self.positions[:, : self.filled], self.segments[:, : self.filled])

    def append(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Room for one more token of every row, at positions (B,): its slot, and how many slots are filled with it.

        For rows of one document, whose entries are all attended to, in whatever order they lie.
        """
        slots, counts = positions % self.size, (positions + 1).clamp(max=self.size)
        rows = torch.arange(len(slots), device=slots.device)
        self.positions[rows, slots] = positions
        self.segments[rows, slots] = self.segments[:, 0].clone()
        self.filled = min(longest, self.size)
        return slots, counts

    def _places(self, T: int, lengths: list[int], new_lengths: list[int]) -> slice | tuple[Tensor, Tensor, Tensor]:
        """One stretch of slots where all rows agree, else (row, column, slot) of every token that is kept."""
        first = lengths[0] % self.size
        if min(lengths) == max(lengths) and (lengths[0] + T <= self.size or T == min(new_lengths) == 1):
            return slice(first, first + T)
        old, new = torch.tensor(lengths)[:, None], torch.tensor(new_lengths)[:, None]
        column = torch.arange(T)
        rows, columns = ((column < new) & (column >= new - self.size)).nonzero(as_tuple=True)
        slots = (old[rows, 0] + columns) % self.size
        return rows.to(self.positions.device), columns.to(self.positions.device), slots.to(self.positions.device)

    def _put(self, stored: Tensor, new: Tensor) -> None:
        """stored (B, size), new (B, T)."""
        if isinstance(self._slots, slice):
            stored[:, self._slots] = new
        else:
            rows, columns, slots = self._slots
            stored[rows, slots] = new[rows, columns]

    def put(self, stored: Tensor, new: Tensor) -> Tensor:
        """stored (B, Kv, size, Dh), new (B, T, Kv, Dh); returns what the new tokens attend to, (B, Kv, S, Dh)."""
        attended = None
        if self.old is not None:
            attended = torch.cat([stored[:, :, self.old], new.transpose(1, 2)], dim=2)
        if isinstance(self._slots, slice):
            stored[:, :, self._slots] = new.transpose(1, 2)
        else:
            rows, columns, slots = self._slots
            stored[rows, :, slots] = new[rows, columns]
        return stored[:, :, : self.filled] if attended is None else attended


class KVCache:
    """Room for `capacity` tokens a row. `lengths` says how many each row has seen.

    When every layer has a window of at most `capacity`, there is room for any number.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = capacity
        self.windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        self.rings = {
            window: Ring(window, min(window or capacity, capacity), batch_size, device)
            for window in dict.fromkeys(self.windows)
        }
        shapes = [
            (batch_size, config.num_key_value_heads, self.rings[window].size, config.head_dim)
            for window in self.windows
        ]
        # zeros, since a masked entry still meets its value in 0 · v, and what lies in empty memory may be NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self._lengths = torch.zeros(batch_size, dtype=torch.int64)
        self.used = 0
        """tokens that the longest row has seen"""
        self.one_document = True
        """Every row is one document at positions 0, 1, 2, …: then entries of a full row need no mask."""

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has seen."""
        return self._lengths.tolist()

    @property
    def nbytes(self) -> int:
        """Of the keys and values."""
        return sum(stored.nbytes for stored in (*self.keys, *self.values))

    def next_tokens(self, T: int) -> tuple[Tensor, Tensor]:
        """position_ids and segment_ids of T more tokens of every row's last document: int64 (B, T) each."""
        ring = next(iter(self.rings.values()))
        device = ring.positions.device
        lengths = self._lengths.to(device)[:, None]
        last = (lengths - 1).clamp(min=0) % ring.size
        positions = torch.where(lengths > 0, ring.positions.gather(1, last) + 1, 0)
        segments = torch.where(lengths > 0, ring.segments.gather(1, last), 1)
        return positions + torch.arange(T, device=device), segments.expand(-1, T)

    def extend(self, position_ids: Tensor, segment_ids: Tensor, new_lengths: list[int], one_document: bool) -> None:
        """Make room for T tokens: position_ids and segment_ids (B, T), of which row b keeps the first new_lengths[b].

        Called once a forward, before the layers write. one_document: whether these tokens continue each row's only
        document. Raises ValueError when a row would hold more than the capacity.
        """
        self._check_room(position_ids.shape[1])
        position_ids = position_ids.expand(len(new_lengths), -1)
        for ring in self.rings.values():
            ring.extend(position_ids, segment_ids, self.lengths, new_lengths)
        self._lengths = self._lengths + torch.tensor(new_lengths)
        self.used = max(self.lengths, default=0)
        self.one_document = self.one_document and one_document

    def _check_room(self, T: int) -> None:
        bounded = any(ring.window is None or ring.size < ring.window for ring in self.rings.values())
        if bounded and self.used + T > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens a row, got {self.used} + {T}")

    def next_entries(self) -> tuple[Tensor, list[Entries]]:
        """Room for one more token of each row's only document: its position, int64 (B,), and its entry in each layer.

        The layers write the keys and values themselves. Raises ValueError as `extend`.
        """
        self._check_room(1)
        positions, device = self._lengths, self.keys[0].device
        places = {window: ring.append(positions.to(device), self.used + 1) for window, ring in self.rings.items()}
        self._lengths, self.used = positions + 1, self.used + 1
        layers = zip(self.keys, self.values, self.windows, strict=True)
        return positions.to(device), [Entries(keys, values, *places[window]) for keys, values, window in layers]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v (B, T, Kv, Dh) of a layer; returns what they attend to, (B, Kv, S, Dh) each."""
        ring = self.rings[self.windows[layer]]
        return ring.put(self.keys[layer], k), ring.put(self.values[layer], v)

    def masks(self, position_ids: Tensor, segment_ids: Tensor, dtype: torch.dtype) -> dict[int | None, Tensor | None]:
        """By window, what to add to the scores of the tokens just made room for: (B, 1, T, S), None to hide nothing."""
        return {window: self._mask(ring, position_ids, segment_ids, dtype) for window, ring in self.rings.items()}

    def _mask(self, ring: Ring, position_ids: Tensor, segment_ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        T = position_ids.shape[1]
        if T == 1 and self.one_document and min(self.lengths) >= ring.filled:
            return None
        allowed = allowed_pairs(position_ids, segment_ids, *ring.attended, window=ring.window)
        allowed |= (segment_ids == 0)[:, :, None]  # padding may see anything: a row of -inf alone would make NaN
        hidden = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)
        return hidden[:, None]

    def repeat(self, num_generations: int) -> None:
        """Each row becomes num_generations equal rows, next to one another."""
        rows = [row for row in range(len(self.lengths)) for _ in range(num_generations)]
        self.select(rows)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row may be named several times.

        Where each row either keeps its place or takes that of one that leaves, nothing else is copied.
        """
        n, before = len(rows), len(self._lengths)
        moved = [(row, place) for place, row in enumerate(rows) if row != place]
        if n <= before and all(row >= n for row, _ in moved):
            self._move([row for row, _ in moved], [place for _, place in moved], n)
        else:
            self._gather(rows)
        index = torch.tensor(rows, dtype=torch.int64)
        self._lengths = self._lengths[index]
        self.used = max(self.lengths, default=0)
        for ring in self.rings.values():
            here = index.to(ring.positions.device)
            ring.positions, ring.segments = ring.positions[here], ring.segments[here]

    def _move(self, rows: list[int], places: list[int], n: int) -> None:
        """Rows n and up into the places of rows that leave; n rows stay."""
        for stored in (self.keys, self.values):
            for layer, old in enumerate(stored):
                filled = self.rings[self.windows[layer]].filled
                if rows:
                    old[places, :, :filled] = old[rows, :, :filled]
                stored[layer] = old[:n]

    def _gather(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.int64, device=self.keys[0].device)
        for stored in (self.keys, self.values):
            for layer, old in enumerate(stored):  # one layer at a time bounds the copy
                filled = self.rings[self.windows[layer]].filled
                new = torch.zeros(len(rows), *old.shape[1:], dtype=old.dtype, device=old.device)
                new[:, :, :filled] = old[:, :, :filled].index_select(0, index)
                stored[layer] = new

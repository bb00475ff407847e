"""QuantizedTensor: everything needed to dequantize a weight, and nothing else.

Bytes per weight, block size B, with double quantization: 1/2 + 1/B + 4/(256·B), that is 4.127 bits for B = 64;
without it 1/2 + 4/B, 4.5 bits (QLoRA, arXiv 2305.14314, §3, "Double Quantization").
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .double_quant import BLOCKSIZE2, dequantize_absmax


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in blocks of `blocksize` codes, each block with one scale. n weights, n_blocks = ⌈n / blocksize⌉.

    The scales are either `absmax`, or, with double quantization, `absmax_8bit`, `absmax_code`, `absmax2` and
    `absmax_offset`. `code` and `absmax_code` are the same tensor for every layer on a device: they are not copied.
    """

    packed: Tensor
    """uint8 (⌈n/2⌉,): two 4-bit codes a byte, the first in the high nibble. Other widths: (n,), a code a byte."""
    code: Tensor
    """fp32 (2^bits,): the code book."""
    absmax: Tensor | None
    """fp32 (n_blocks,): the largest magnitude of each block; None with double quantization."""
    blocksize: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    """What `dequantize` returns unless told otherwise: the dtype the weight had."""
    quant_type: str
    absmax_8bit: Tensor | None = None
    """uint8 (n_blocks,): index into `absmax_code`."""
    absmax_code: Tensor | None = None
    """fp32 (256,): the signed dynamic map."""
    absmax2: Tensor | None = None
    """fp32 (⌈n_blocks / blocksize2⌉,): the largest magnitude of each block of (absmax - offset)."""
    absmax_offset: Tensor | None = None
    """fp32 (): the mean of absmax."""
    blocksize2: int = BLOCKSIZE2

    @property
    def double_quant(self) -> bool:
        return self.absmax_8bit is not None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def n_blocks(self) -> int:
        return -(-self.numel // self.blocksize)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def scales(self) -> Tensor:
        """absmax of every block, fp32 (n_blocks,): stored, or absmax_code[absmax_8bit] · absmax2 + absmax_offset."""
        if self.absmax is not None:
            return self.absmax
        parts = self.tensors()
        return dequantize_absmax(
            parts["absmax_8bit"], parts["absmax_code"], parts["absmax2"], parts["absmax_offset"], self.blocksize2
        )

    @property
    def nbytes(self) -> int:
        """Bytes this weight holds: codes and scales. The code book and the 8-bit map are shared and not counted."""
        return sum(t.nbytes for name, t in self.tensors().items() if name not in ("code", "absmax_code"))

    @property
    def bits_per_param(self) -> float:
        return 8 * self.nbytes / self.numel

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "QuantizedTensor":
        """A copy that holds `tensors` in the named fields. Raises ValueError for a name that is no tensor field."""
        unknown = set(tensors) - set(self.tensors())
        if unknown:
            raise ValueError(f"with_tensors takes {sorted(self.tensors())}, got also {sorted(unknown)}")
        return replace(self, **tensors)  # type: ignore[arg-type]  # names were checked: all are tensor fields

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same weight on `device`. Bits do not change; `dtype` stays."""
        if torch.device(device) == self.device:
            return self
        maps = {name: shared_map(t, device) for name, t in self.tensors().items() if name in ("code", "absmax_code")}
        moved = {name: t.to(device) for name, t in self.tensors().items() if name not in maps}
        return self.with_tensors(moved | maps)


_maps: dict[tuple[bytes, torch.device], Tensor] = {}


def shared_map(levels: Tensor, device: torch.device | str) -> Tensor:
    """One tensor for each content and device, however many layers hold it. levels: fp32 (n,)."""
    on_cpu = levels.detach().cpu()
    target = torch.empty(0, device=device).device
    key = (on_cpu.numpy().tobytes(), target)
    if key not in _maps:
        _maps[key] = on_cpu.to(target)
    return _maps[key]

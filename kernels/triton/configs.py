"""Tile shapes for each generation of GPU: what autotune chooses from, and what compile_check compiles.

mma      sm_80, 86, 89, 120: tensor cores read the weight from registers, straight after the lookup. Warps lie along
         N while BM ≤ 64; above, rows of warps would each look up the same weights, so BM stops at 64.
wgmma    sm_90: the weight goes through shared memory, looked up once; tiles have 64 rows or more; BM = 16 takes mma.
tcgen05  sm_100: as wgmma.
amd      gfx942: the exact gather.

A block of 32 leaves BK = 32, for which Triton 3.7 cannot lay out the weight of wgmma and tcgen05 in shared memory:
there only tiles of fewer than 64 rows serve it, which take mma.

sm_75 has no entry: Triton gives its dot no tensor cores there (fp32 multiply-adds, thousands of spills), so a T4
dequantizes and calls torch.matmul. BK of forward, and of backward the same columns, must divide the block size.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config:
    """A program's tile of rows, out_features and in_features, and how the compiler may spread it."""

    BM: int
    BN: int
    BK: int = 64
    num_warps: int = 4
    num_stages: int = 3

    def within(self, blocksize: int) -> "Config":
        """The same with BK at most a block: one scale a row and tile."""
        return replace(self, BK=min(self.BK, blocksize))

    def __str__(self) -> str:
        return f"{self.BM}x{self.BN}x{self.BK} w{self.num_warps} s{self.num_stages}"


FAMILIES = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 103: "tcgen05", 120: "mma", 121: "mma"}

FORWARD = {
    "mma": (Config(16, 128), Config(32, 128), Config(64, 128)),
    "wgmma": (Config(16, 128), Config(64, 128), Config(64, 256), Config(128, 256, num_warps=8)),
    "tcgen05": (Config(16, 128), Config(64, 256), Config(128, 256, num_warps=8)),
    "amd": (Config(16, 64, num_stages=1), Config(64, 64, num_stages=1)),
}
BACKWARD = {
    "mma": (Config(16, 128), Config(32, 128), Config(64, 128)),
    "wgmma": (Config(16, 128), Config(64, 128), Config(128, 128)),
    "tcgen05": (Config(16, 128), Config(64, 128), Config(128, 128)),
    "amd": (Config(16, 64, num_stages=1), Config(64, 64, num_stages=1)),
}
SHORT = (Config(16, 128), Config(32, 128))
"""Tiles that take mma on every generation from sm_80: for blocks of 32 on wgmma and tcgen05."""
INTERPRETED = Config(16, 32, 32)
EXACT_FP32 = Config(16, 32, 32, num_stages=2)
"""fp32 activations: no tensor cores, the exact lookup. A check, not the product."""

SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, 942: 64}
"""KiB a block may use (CUDA C++ Programming Guide, table of compute capabilities; CDNA 3: 64 KiB of LDS)."""


def family(capability: int) -> str | None:
    """Which entry serves a compute capability, None where only dequantize and torch.matmul do."""
    return FAMILIES.get(capability)


def tiles(direction: str, family: str, blocksize: int) -> list[Config]:
    """The tiles of `direction` (forward or backward) that a family has for a block size, the lowest first."""
    table = FORWARD if direction == "forward" else BACKWARD
    every = SHORT if blocksize < 64 and family in ("wgmma", "tcgen05") else table[family]
    return [config.within(blocksize) for config in every]


def split_for(tiles: int, steps: int, multiprocessors: int) -> int:
    """Parts to cut a sum of `steps` tiles into, a power of two: two programs a multiprocessor, 4 steps or more each."""
    split = 1
    while split < 16 and tiles * split * 2 <= 2 * multiprocessors and steps // (split * 2) >= 4:
        split *= 2
    return split

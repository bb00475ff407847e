"""x · Ŵᵀ and dy · Ŵ on a GPU, straight from the 4-bit codes: Ŵ exists a tile at a time, in registers.

    forward    y  = x · Ŵᵀ + low · upᵀ + b         Ŵ (N, K); low (M, r) and up (N, r) are the LoRA terms, side by side
    backward   dx = dy · Ŵ + low · up              low = s · dy · B (M, r), up = A (r, K)

    M rows, K = in_features, N = out_features, r rank (all adapters together); BM, BN, BK a program's tile of each

The accumulator starts from the low-rank product, so that LoRA costs r/K of a product and no pass over y. Layout: that
of bitsandbytes, row-major bytes with the even column in the high nibble; K must be a multiple of the block size, so
that a tile of BK ≤ block size columns needs one scale a row. M and N are any. Must equal F.linear(x, dequantize(q))
within the accuracy of x.dtype; lookup.py says how the weight is rounded on the way. Accumulation is in fp32.

Small M (decoding) does not fill a GPU with tiles: the sum is cut into SPLIT parts, each to its own fp32 slice of a
workspace, added in order by `reduce_kernel`. No atomics: equal inputs give equal bits. 1 to 16 rows take the tile of
16, forward and backward: a tensor core multiplies 16 rows at once whatever they hold, which is a small part of what
looking a weight up costs (compile.csv), so a kernel for fewer rows would have nothing to save.
"""

import triton
import triton.language as tl

from .lookup import add_product, block_scales, rounded, scaled_tile


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x,
    packed,
    code,
    absmax,
    absmax_code,
    absmax2,
    absmax_offset,
    low,
    up,
    bias,
    y,
    M,
    N,
    rank,
    K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    """y (M, N), or with SPLIT > 1 fp32 (SPLIT, M, N), each slice the sum over its part of K, without the bias."""
    tile_m, tile_n = _tile(M, N, BM, BN, GROUP)
    part = tl.program_id(1)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.minimum(m, M - 1).to(tl.int64)  # a row past the end reads the last one, and is not stored
    column = tl.minimum(n, N - 1).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    if HAS_LORA:
        acc = _add_low_rank(low, row, up + column * rank, 1, rank if part == 0 else 0, rank, acc)

    x_tile = x + row[:, None] * K + tl.arange(0, BK)[None, :]
    w_tile = packed + column[:, None] * (K // 2) + tl.arange(0, BK // 2)[None, :]
    first_block = (column * (K // BLOCKSIZE)).to(tl.int32)
    steps: tl.constexpr = (K // BK + SPLIT - 1) // SPLIT
    for step in range(part * steps, tl.minimum(part * steps + steps, K // BK)):
        codes = tl.load(w_tile + step * (BK // 2))
        block = first_block + (step // (BLOCKSIZE // BK))
        scale = block_scales(block, absmax, absmax_code, absmax2, absmax_offset, DOUBLE)
        w = scaled_tile(codes, scale, code, dtype, ASM)
        acc = add_product(tl.load(x_tile + step * BK), tl.trans(w), acc)

    if HAS_BIAS and SPLIT == 1:
        acc += tl.load(bias + column).to(tl.float32)[None, :]
    _store(y, acc, part, m, n, M, N)


@triton.jit(do_not_specialize=["M"])
def backward_kernel(
    dy,
    packed,
    code,
    absmax,
    absmax_code,
    absmax2,
    absmax_offset,
    low,
    up,
    dx,
    M,
    N,
    rank,
    K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    HAS_LORA: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    """dx (M, K), or with SPLIT > 1 fp32 (SPLIT, M, K), each slice the sum over its part of N."""
    tile_m, tile_k = _tile(M, K, BM, BK, GROUP)
    part = tl.program_id(1)
    m = tile_m * BM + tl.arange(0, BM)
    k = tile_k * BK + tl.arange(0, BK)
    dtype: tl.constexpr = dy.dtype.element_ty
    row = tl.minimum(m, M - 1).to(tl.int64)
    acc = tl.zeros((BM, BK), tl.float32)
    if HAS_LORA:
        acc = _add_low_rank(low, row, up + k, K, rank if part == 0 else 0, rank, acc)

    byte = tile_k * (BK // 2) + tl.arange(0, BK // 2)
    block_in_row = tile_k // (BLOCKSIZE // BK)
    steps = tl.cdiv(tl.cdiv(N, BN), SPLIT)
    start = part * steps * BN
    for n in range(start, tl.minimum(start + steps * BN, N), BN):
        reduced = n + tl.arange(0, BN)
        column = tl.minimum(reduced, N - 1)  # past the end: dy is 0, and the weight is finite
        codes = tl.load(packed + column.to(tl.int64)[:, None] * (K // 2) + byte[None, :])
        block = column * (K // BLOCKSIZE) + block_in_row
        scale = block_scales(block, absmax, absmax_code, absmax2, absmax_offset, DOUBLE)
        w = scaled_tile(codes, scale, code, dtype, ASM)
        tile = tl.load(dy + row[:, None] * N + reduced[None, :], (reduced < N)[None, :], other=0.0)
        acc = add_product(tile, w, acc)
    _store(dx, acc, part, m, k, M, K)


@triton.jit
def reduce_kernel(parts, bias, y, M, N, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y (M, N) = Σ parts (SPLIT, M, N) + bias, added in order, rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M * N
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * M * N + at, inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, inside, other=0.0).to(tl.float32)
    tl.store(y + at, rounded(total, y.dtype.element_ty), inside)


@triton.jit
def _tile(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of rows, and of columns. GROUP tiles of rows share a weight tile while it is in L2."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    at = tl.program_id(0)
    return tl.swizzle2d(at // tiles_n, at % tiles_n, tiles_m, tiles_n, GROUP)


@triton.jit
def _add_low_rank(low, row, up, step: tl.constexpr, end, rank, acc):
    """acc + low · up over r < end. up: where each column starts; `step` lies between its elements."""
    for r in range(0, end, 16):
        k = r + tl.arange(0, 16)
        a = tl.load(low + row[:, None] * rank + k[None, :], k[None, :] < rank, other=0.0)
        b = tl.load(up[None, :] + k[:, None] * step, k[:, None] < rank, other=0.0)
        acc = add_product(a, b, acc)
    return acc


@triton.jit
def _store(out, acc, part, m, n, M, N):
    at = part.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, rounded(acc, out.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])

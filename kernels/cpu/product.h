/* product.h: what forward and backward take, and where things lie in their workspace. Included by kernels.c alone. */

/*  forward   y  (M, N) = x (M, K) · Ŵᵀ + low (M, r) · upᵀ (r, N) + bias      outputs N, reduced over K, up = B (N, r)
    backward  dx (M, K) = dy (M, N) · Ŵ + low (M, r) · up (r, K)              outputs K, reduced over N, up = A (r, K)

    low is scaling · x Aᵀ in forward and scaling · dy B in backward. Forward also takes a dense weight, where q is NULL.

    compute_dtype says what x and Ŵ (for many rows, low and up too) are rounded to before they are multiplied, where the
    unit multiplies pairs of bf16 numbers; elsewhere, and under FP32, nothing is rounded. Sums are fp32. */
typedef struct {
    const weight *q;
    int64_t M, N, K, r;
    const void *x;
    void *y;
    int dtype, y_dtype, compute_dtype; /* FP32 or BF16, each; dtype is x's */
    const float *bias, *low, *up; /* each may be NULL (bias), or unused (r = 0) */
    float *workspace;
    int threads;
    const void *dense; /* (N, K) */
    int dense_dtype;
} product;

/* A word is what a lane multiplies at a time: an fp32 number, or a pair of bf16 numbers. Tiles and blocks are in words. */
INLINE int64_t words_of(int64_t n, const int pairs) { return pairs ? (n + 1) / 2 : n; }

INLINE int in_pairs(const product *p) { return p->compute_dtype == BF16; }

enum {
    TILE_ROWS = LANES == 16 ? 12 : 6, /* rows of x in registers at a time, of 2 vectors of outputs each */
    THIRD = TILE_ROWS / 3,
    PANEL = 2 * LANES,       /* outputs side by side */
    REDUCE = 288,            /* words of the reduction that lie together: TILE_ROWS rows of x stay in the L1 cache */
    STEPS = LANES == 4 ? 32 : REDUCE, /* words summed at a time: few where each may round twice, for want of an fma */
    ROOM = LANES == 4 ? 0 : 32, /* and low-rank steps that are summed with the last of them */
    OUT = LANES == 8 ? 192 : 288, /* outputs a tile at most: where AVX2 is all, the L2 cache is half as large */
    ROWS = 516,              /* rows of x that share a decoded tile: a multiple of TILE_ROWS */
    TILE_STEPS = REDUCE + ROOM,
    X_STEP = TILE_STEPS + 16, /* between rows that lie side by side: not a power of two, or they would share cache sets */
    TILE_FLOATS = OUT * TILE_STEPS,
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Floats: a decoded tile, and the sums of its outputs. */
INLINE int64_t floats_per_thread(int64_t rows) { return TILE_FLOATS + OUT * rows; }

int64_t FOR_ISA(workspace_floats)(int64_t M, int64_t N, int64_t K, int64_t r, int threads) {
    int64_t longest = N > K ? N : K, few = (longest + r) * smaller(M, PANEL);
    int64_t many = threads * floats_per_thread(smaller(M, ROWS));
    return few > many ? few : many;
}

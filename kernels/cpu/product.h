/* product.h: what forward and backward take, and where things lie in their workspace. Included by kernels.c alone. */

/*  forward   y  (M, N) = x (M, K) · Ŵᵀ + low (M, r) · upᵀ (r, N) + bias      outputs N, reduced over K, up = B (N, r)
    backward  dx (M, K) = dy (M, N) · Ŵ + low (M, r) · up (r, K)              outputs K, reduced over N, up = A (r, K)

    low is scaling · x Aᵀ in forward and scaling · dy B in backward. */
typedef struct {
    const weight *q;
    int64_t M, N, K, r;
    const void *x; /* fp32 or bf16, as y */
    void *y;
    int dtype;
    const float *bias, *low, *up; /* each may be NULL (bias), or unused (r = 0) */
    float *workspace;
    int threads;
} product;

enum {
    PANEL = 2 * LANES,       /* rows of x side by side, so that one load takes LANES of them */
    REDUCE = LANES == 16 ? 128 : 256, /* steps of the reduction at a time: a panel of x, 16 KiB, stays in the L1 cache */
    OUT = 96,                /* outputs a tile: a multiple of TILE_OUT, and of the 32 weights decoded at once */
    ROWS = 512,              /* rows of x a sweep over the weight: what decoding is shared by */
    ROW_STEP = REDUCE + 16,  /* between rows of a decoded tile: not a power of two, or they would share cache sets */
    TILE_FLOATS = OUT * ROW_STEP,
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t panels_of(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

/* Floats: rows of x and low, packed; then for each thread a decoded tile and its accumulators. */
INLINE int64_t floats_per_thread(int64_t panels) { return TILE_FLOATS + OUT * panels * PANEL; }

int64_t FOR_ISA(workspace_floats)(int64_t M, int64_t N, int64_t K, int64_t r, int threads) {
    int64_t panels = panels_of(smaller(M, ROWS)), longest = N > K ? N : K;
    return (longest + r) * panels * PANEL + threads * floats_per_thread(panels);
}

/* low_rank.h: the products of an adapter that have few columns or few rows, r of them. What goes in is all fp32 or all
   bf16, what comes out fp32. Included by kernels.c alone.

     narrow   y (M, r) = x (M, K) · Aᵀ, A (r, K)                 x · Aᵀ, and dy · B with B transposed
     outer    y (r, K) = Σ_m h[m]ᵀ · x[m], h (M, r), x (M, K)    dA = highᵀ · x, dBᵀ = lowᵀ · dy

   A general product packs what it multiplies; here that would be most of the work. */

enum { OUTER_ROWS = LANES == 16 ? 8 : 4, OUTER_STEPS = 64, OUTER_AHEAD = 8 };

/* Up to TILE_M rows of y from row m on. K in words. */
INLINE void narrow_rows(const void *x, const void *A, const int dtype, int64_t m, int64_t M, int64_t r, int64_t K,
                        float *y, const int pairs) {
    for (int64_t n = 0; n + TILE_N <= r; n += TILE_N)
        dense_rows(x, dtype, m * K, A, dtype, n * K, K, y + m * r + n, r, smaller(TILE_M, M - m), pairs);
}

void FOR_ISA(narrow)(const void *x, const void *A, int dtype, int64_t M, int64_t r, int64_t K, float *y, int threads) {
    const int pairs = PAIRS && dtype == BF16 && K % (2 * LANES) == 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (M * r > 64)
    for (int64_t m = 0; m < M; m += TILE_M) {
        if (PAIRS && pairs)
            narrow_rows(x, A, FP32, m, M, r, K / 2, y, PAIRS);
        else if (dtype == FP32)
            narrow_rows(x, A, FP32, m, M, r, K, y, 0);
        else
            narrow_rows(x, A, BF16, m, M, r, K, y, 0);
        for (int64_t i = m; i < smaller(M, m + TILE_M); i++)
            for (int64_t n = r / TILE_N * TILE_N; n < r; n++) y[i * r + n] = dot_as(x, i * K, A, n * K, dtype, K);
    }
}

/* Rows i0 … and PANEL columns of y, from `steps` rows of h and x. Rows beyond the last repeat it, and are not stored. */
INLINE void outer_tile(const void *h, int64_t from, const void *x, int64_t at, const int dtype, int64_t steps, int64_t r,
                       int64_t i0, int64_t K, float *y, int add) {
    const int64_t size = dtype == FP32 ? 4 : 2;
    vec sum[OUTER_ROWS][2];
    int64_t row[OUTER_ROWS];
    for (int i = 0; i < OUTER_ROWS; i++) row[i] = smaller(i0 + i, r - 1);
#pragma GCC unroll 8
    for (int i = 0; i < OUTER_ROWS; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int64_t m = 0; m < steps; m++, from += r, at += K) {
        vec x0 = load_as(x, dtype, at), x1 = load_as(x, dtype, at + LANES);
        fetch((const char *)x + (at + OUTER_AHEAD * K) * size, size * PANEL);
#pragma GCC unroll 8
        for (int i = 0; i < OUTER_ROWS; i++) {
            vec h_i = every(number_as(h, dtype, from + row[i]));
            sum[i][0] = fma_(x0, h_i, sum[i][0]);
            sum[i][1] = fma_(x1, h_i, sum[i][1]);
        }
    }
    for (int i = 0; i < smaller(OUTER_ROWS, r - i0); i++)
        for (int v = 0; v < 2; v++) {
            float *to = y + (i0 + i) * K + v * LANES;
            store(to, add ? load(to) + sum[i][v] : sum[i][v]);
        }
}

/* K is a multiple of PANEL. */
void FOR_ISA(outer)(const void *h, const void *x, int dtype, int64_t M, int64_t r, int64_t K, float *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < K; j += PANEL)
        for (int64_t m = 0; m < M; m += OUTER_STEPS) /* few enough that x stays in the L1 cache for all rows of y */
            for (int64_t i = 0; i < r; i += OUTER_ROWS) {
                const int64_t steps = smaller(OUTER_STEPS, M - m);
                if (dtype == FP32)
                    outer_tile(h, m * r, x, m * K + j, FP32, steps, r, i, K, y + j, m > 0);
                else
                    outer_tile(h, m * r, x, m * K + j, BF16, steps, r, i, K, y + j, m > 0);
            }
}

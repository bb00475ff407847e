/* low_rank.h: the products of an adapter that have few columns or few rows, r of them, all fp32. Included by kernels.c
   alone.

     narrow   y (M, r) = x (M, K) · Aᵀ, A (r, K)                 x · Aᵀ, and dy · B with B transposed
     outer    y (r, K) = Σ_m h[m]ᵀ · x[m], h (M, r), x (M, K)    dA = highᵀ · x, dBᵀ = lowᵀ · dy

   A general product packs what it multiplies; here that would be most of the work. */

enum { OUTER_ROWS = LANES == 16 ? 8 : 4, OUTER_STEPS = 64, OUTER_AHEAD = 8 };

void FOR_ISA(narrow)(const float *x, const float *A, int64_t M, int64_t r, int64_t K, float *y, int threads) {
    const int64_t whole = r / TILE_N * TILE_N;
#pragma omp parallel for num_threads(threads) schedule(static) if (M * r > 64)
    for (int64_t m = 0; m < M; m += TILE_M) {
        for (int64_t n = 0; n < whole; n += TILE_N)
            dense_rows(x + m * K, A, FP32, n * K, K, y + m * r + n, r, smaller(TILE_M, M - m));
        for (int64_t i = m; i < smaller(M, m + TILE_M); i++)
            for (int64_t n = whole; n < r; n++) y[i * r + n] = dot(x + i * K, A + n * K, K);
    }
}

/* Rows i0 … and PANEL columns of y, from `steps` rows of h and x. Rows beyond the last repeat it, and are not stored. */
INLINE void outer_tile(const float *h, const float *x, int64_t steps, int64_t r, int64_t i0, int64_t K, float *y, int add) {
    vec sum[OUTER_ROWS][2];
    int64_t row[OUTER_ROWS];
    for (int i = 0; i < OUTER_ROWS; i++) row[i] = smaller(i0 + i, r - 1);
#pragma GCC unroll 8
    for (int i = 0; i < OUTER_ROWS; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int64_t m = 0; m < steps; m++, h += r, x += K) {
        vec x0 = load(x), x1 = load(x + LANES);
        fetch((const char *)(x + OUTER_AHEAD * K), 4 * PANEL);
#pragma GCC unroll 8
        for (int i = 0; i < OUTER_ROWS; i++) {
            vec h_i = every(h[row[i]]);
            sum[i][0] = fma_(x0, h_i, sum[i][0]);
            sum[i][1] = fma_(x1, h_i, sum[i][1]);
        }
    }
    for (int i = 0; i < smaller(OUTER_ROWS, r - i0); i++)
        for (int v = 0; v < 2; v++) {
            float *at = y + (i0 + i) * K + v * LANES;
            store(at, add ? load(at) + sum[i][v] : sum[i][v]);
        }
}

/* K is a multiple of PANEL. */
void FOR_ISA(outer)(const float *h, const float *x, int64_t M, int64_t r, int64_t K, float *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < K; j += PANEL)
        for (int64_t m = 0; m < M; m += OUTER_STEPS) /* few enough that x stays in the L1 cache for all rows of y */
            for (int64_t i = 0; i < r; i += OUTER_ROWS)
                outer_tile(h + m * r, x + m * K + j, smaller(OUTER_STEPS, M - m), r, i, K, y + j, m > 0);
}

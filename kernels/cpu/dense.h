/* dense.h: x · Wᵀ for a dense weight that is read as it lies, x and W in bf16 or fp32: the head in decoding, and an adapter
   (low_rank.h). Included by kernels.c alone.

   A tile of TILE_N outputs and up to TILE_M rows is LANES sums, a vector each; they are summed across lanes together.
   Where the unit multiplies pairs, rows of bf16 are read as words, half as many, and multiplied without being widened. */

enum { TILE_M = 4, TILE_N = LANES / TILE_M, TASK = 64, TILES_AHEAD = 2 };

/* y[m][n] = Σ_k x[from + m · K + k] · w[at + n · K + k] for M ≤ TILE_M rows and TILE_N outputs. Of words that are pairs K is
   a multiple of LANES. */
INLINE void dense_tile(const void *x, const int x_dtype, int64_t from, const void *w, const int dtype, int64_t at,
                       int64_t K, float *y, int64_t N, const int M, const int pairs) {
    vec sums[LANES];
    float out[LANES], tail[LANES] = {0};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) sums[i] = (vec){0};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES)
#pragma GCC unroll 4
        for (int n = 0; n < TILE_N; n++) {
            vec row = load_as(w, dtype, at + n * K + k);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const vec x_m = load_as(x, x_dtype, from + m * K + k), sum = sums[n * TILE_M + m];
                sums[n * TILE_M + m] = pairs ? dot_pairs(row, x_m, sum) : fma_(row, x_m, sum);
            }
        }
    for (; k < K; k++)
        for (int n = 0; n < TILE_N; n++)
            for (int m = 0; m < M; m++)
                tail[n * TILE_M + m] += number_as(x, x_dtype, from + m * K + k) * number_as(w, dtype, at + n * K + k);
    store(out, sum_each(sums) + load(tail));
    for (int n = 0; n < TILE_N; n++)
        for (int m = 0; m < M; m++) y[m * N + n] = out[n * TILE_M + m];
}

INLINE void dense_rows(const void *x, const int x_dtype, int64_t from, const void *w, const int dtype, int64_t at,
                       int64_t K, float *y, int64_t N, int64_t M, const int pairs) {
    switch (M) { /* the count of rows as a constant, so that its loops unroll into registers */
        case 1: dense_tile(x, x_dtype, from, w, dtype, at, K, y, N, 1, pairs); break;
        case 2: dense_tile(x, x_dtype, from, w, dtype, at, K, y, N, 2, pairs); break;
        case 3: dense_tile(x, x_dtype, from, w, dtype, at, K, y, N, 3, pairs); break;
        default: dense_tile(x, x_dtype, from, w, dtype, at, K, y, N, 4, pairs); break;
    }
}

/* TASK rows of W with all of x. While some meet x, the next ones are fetched. */
INLINE void dense_task(const float *x, const void *w, const int dtype, int64_t M, int64_t N, int64_t K, float *y,
                       int64_t task, const int pairs) {
    const int64_t bytes = TILE_N * K * (dtype == FP32 ? 4 : 2), share = M > TILE_M ? bytes * TILE_M / M : bytes;
    for (int64_t n = task; n < smaller(N, task + TASK); n += TILE_N)
        for (int64_t m = 0; m < M; m += TILE_M) {
            const char *next = (const char *)w + (n / TILE_N + TILES_AHEAD) * bytes + m / TILE_M * share;
            if (n + TILES_AHEAD * TILE_N < N) fetch(next, share);
            dense_rows(x, FP32, m * K, w, dtype, n * K, K, y + m * N + n, N, smaller(TILE_M, M - m), pairs);
        }
}

/* y fp32 (M, N) = x (M, K) · Wᵀ, W (N, K) of a dtype; N is a multiple of TILE_N. x is fp32, or bf16 as W in pairs. A row's
   sums do not depend on the others. */
void FOR_ISA(dense_few)(const void *x, const void *w, int dtype, int64_t M, int64_t N, int64_t K, float *y, int pairs,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < N; task += TASK)
        if (PAIRS && pairs)
            dense_task(x, w, FP32, M, N, K / 2, y, task, PAIRS);
        else if (dtype == FP32)
            dense_task(x, w, FP32, M, N, K, y, task, 0);
        else
            dense_task(x, w, BF16, M, N, K, y, task, 0);
}

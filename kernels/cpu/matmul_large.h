/* matmul_large.h: the product for many rows, forward and backward. Included by kernels.c alone.

   Blocked as in Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with the weight in
   the place of the matrix that is packed on the way: here it is decoded on the way, a tile at a time, into the cache.

     for every OUT outputs and ROWS rows of x (in parallel; each thread has its own tile of the weight):
       for every STEPS of the reduction: decode the tile, panels of PANEL outputs: [panel][step][output];
         for every TILE_ROWS rows of x, copied side by side, and every panel:
           TILE_ROWS · 2 accumulators in registers; each step loads 2 vectors of the tile, broadcasts TILE_ROWS of x
       low-rank terms go on as further reduction steps, over `low` and `up`

   The accumulators are added to y itself where it is fp32, else to fp32 sums that are rounded at the end. Every output
   is summed in index order by one thread: it does not depend on how many threads there are. */

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

/* rows[i][t] → columns[t · PANEL + i] for i, t < LANES. Each of log2 LANES rounds sets row i and row i + LANES/2 side
   by side, a number from each in turn. */
#if LANES == 16
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOWER 0, 4, 1, 5
#define UPPER 2, 6, 3, 7
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE void transpose(const float *rows, int64_t row_step, float *columns) {
    vec a[LANES], b[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) a[i] = load(rows + i * row_step);
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = SHUFFLE(a[i], a[i + LANES / 2], LOWER);
            b[2 * i + 1] = SHUFFLE(a[i], a[i + LANES / 2], UPPER);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) a[i] = b[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(columns + i * PANEL, a[i]);
}

/* Ŵ for outputs j0 … and reduction indices t0 …, where a row of Ŵ is an output: decoded LANES rows at a time. */
INLINE void decode_tile(const product *p, const codebook *code, int64_t j0, int64_t outputs, int64_t t0, int64_t steps,
                        float *tile) {
    float rows[LANES * X_STEP];
    for (int64_t j = 0; j < outputs; j += LANES) {
        for (int64_t i = 0; i < LANES; i++)
            if (j + i < outputs)
                decode_span(p->q, code, (j0 + j + i) * p->K + t0, steps, rows + i * X_STEP);
            else
                memset(rows + i * X_STEP, 0, 4 * (size_t)steps);
        float *panel = tile + j / PANEL * REDUCE * PANEL + j % PANEL;
        for (int64_t t = 0; t < steps; t += LANES) transpose(rows + t, X_STEP, panel + t * PANEL);
    }
}

/* Numbers of one reduction step → its place in every panel. */
INLINE void place(const float *line, int64_t outputs, float *tile) {
    for (int64_t j = 0; j < outputs; j += PANEL, tile += REDUCE * PANEL)
        memcpy(tile, line + j, 4 * (size_t)smaller(PANEL, outputs - j));
}

/* The same where a row of Ŵ is a reduction step. */
INLINE void decode_tile_dx(const product *p, const codebook *code, int64_t j0, int64_t outputs, int64_t t0,
                           int64_t steps, float *tile) {
    float line[OUT];
    for (int64_t t = 0; t < steps; t++) {
        decode_span(p->q, code, (t0 + t) * p->K + j0, outputs, line);
        place(line, outputs, tile + t * PANEL);
    }
}

INLINE void copy_up_tile(const product *p, int64_t j0, int64_t outputs, int64_t t0, int64_t steps, float *tile,
                         const int backward) {
    float line[OUT];
    for (int64_t t = 0; t < steps; t++) {
        for (int64_t j = 0; j < outputs; j++)
            line[j] = p->up[backward ? (t0 + t) * p->K + j0 + j : (j0 + j) * p->r + t0 + t];
        place(line, outputs, tile + t * PANEL);
    }
}

/* y[i][j] (+)= Σ_t x[i][t] · w[t][j]: `rows` rows, PANEL outputs. The sum starts from 0 each time: summing in pieces of
   STEPS loses fewer digits than one long sum. */
INLINE void multiply(const float *x, const float *w, int64_t steps, float *y, int64_t y_step, int add, const int rows) {
    vec sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int64_t t = 0; t < steps; t++, w += PANEL) {
        vec w0 = load(w), w1 = load(w + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            vec x_i = every(x[i * X_STEP + t]);
            sum[i][0] = fma_(w0, x_i, sum[i][0]);
            sum[i][1] = fma_(w1, x_i, sum[i][1]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < 2; v++) {
            float *at = y + i * y_step + v * LANES;
            store(at, add ? load(at) + sum[i][v] : sum[i][v]);
        }
}

static void multiply_rows(const float *x, const float *w, int64_t steps, float *y, int64_t y_step, int add,
                          int64_t rows) {
    if (rows > 2 * THIRD)
        multiply(x, w, steps, y, y_step, add, TILE_ROWS);
    else if (rows > THIRD)
        multiply(x, w, steps, y, y_step, add, 2 * THIRD);
    else
        multiply(x, w, steps, y, y_step, add, THIRD);
}

/* The same for rows and outputs that do not fill the registers. */
static void multiply_edge(const float *x, const float *w, int64_t steps, float *y, int64_t y_step, int add,
                          int64_t rows, int64_t outputs) {
    float whole[TILE_ROWS * PANEL];
    multiply_rows(x, w, steps, whole, PANEL, 0, rows);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < outputs; j++)
            y[i * y_step + j] = add ? y[i * y_step + j] + whole[i * PANEL + j] : whole[i * PANEL + j];
}

/* The lines of x's next rows, and of the sums: too short stretches for the processor to notice where they lead. */
INLINE void fetch(const char *at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

/* y (rows, outputs) (+)= x[…][t0 … t0 + steps] · tile, x of `length` columns. */
INLINE void multiply_tile(const void *x, int dtype, int64_t length, int64_t t0, int64_t steps, int64_t rows,
                          const float *tile, int64_t outputs, float *y, int64_t y_step, int add) {
    const int64_t size = dtype == FP32 ? 4 : 2;
    float x_tile[TILE_ROWS * X_STEP];
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        int64_t here = smaller(TILE_ROWS, rows - row), next = row + here;
        for (int64_t i = 0; i < here; i++) read_row(x, dtype, (row + i) * length + t0, steps, x_tile + i * X_STEP);
        for (int64_t j = 0; j < outputs; j += PANEL) {
            const float *panel = tile + j * REDUCE;
            float *at = y + row * y_step + j;
            if (add)
                for (int64_t i = 0; i < here; i++) fetch((const char *)(at + i * y_step), 4 * PANEL);
            for (int64_t i = 0; i < THIRD && next < rows && next < row + 2 * TILE_ROWS; i++, next++)
                fetch((const char *)x + (next * length + t0) * size, steps * size);
            if (here % THIRD || outputs - j < PANEL)
                multiply_edge(x_tile, panel, steps, at, y_step, add, here, smaller(PANEL, outputs - j));
            else
                multiply_rows(x_tile, panel, steps, at, y_step, add, here);
        }
    }
}

static void add_bias(float *y, int64_t y_step, int64_t rows, int64_t outputs, const float *bias) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < outputs; j++) y[i * y_step + j] += bias[j];
}

/* Rows row0 … and outputs j0 … of y. */
INLINE void product_block(const product *p, const codebook *code, int64_t row0, int64_t rows, int64_t j0,
                          int64_t outputs, float *tile, float *sums, const int backward) {
    const int64_t length = backward ? p->N : p->K, all_outputs = backward ? p->K : p->N;
    const void *x = (const char *)p->x + row0 * length * (p->dtype == FP32 ? 4 : 2);
    const int64_t y_step = p->dtype == FP32 ? all_outputs : OUT;
    float *y = p->dtype == FP32 ? (float *)p->y + row0 * all_outputs + j0 : sums;
    for (int64_t t = 0; t < length; t += STEPS) {
        int64_t steps = smaller(STEPS, length - t);
        if (backward)
            decode_tile_dx(p, code, j0, outputs, t, steps, tile);
        else
            decode_tile(p, code, j0, outputs, t, steps, tile);
        multiply_tile(x, p->dtype, length, t, steps, rows, tile, outputs, y, y_step, t > 0);
    }
    for (int64_t t = 0; t < p->r; t += STEPS) {
        int64_t steps = smaller(STEPS, p->r - t);
        copy_up_tile(p, j0, outputs, t, steps, tile, backward);
        multiply_tile(p->low + row0 * p->r, FP32, p->r, t, steps, rows, tile, outputs, y, y_step, 1);
    }
    if (p->bias) add_bias(y, y_step, rows, outputs, p->bias + j0);
    if (p->dtype != FP32)
        for (int64_t i = 0; i < rows; i++)
            write_row(sums + i * OUT, outputs, p->y, p->dtype, (row0 + i) * all_outputs + j0);
}

/* Outputs of a task: fewer where the threads would else have less than two tasks each. A multiple of PANEL, and of the
   32 weights decoded at once. */
static int64_t outputs_of_task(int64_t all_outputs, int64_t M, int threads) {
    const int64_t sizes[] = {OUT, OUT / 2, 32}, row_blocks = (M + ROWS - 1) / ROWS;
    int i = 0;
    while (i < 2 && (all_outputs + sizes[i] - 1) / sizes[i] * row_blocks < 2 * threads) i++;
    return sizes[i];
}

INLINE void many_rows(const product *p, const int backward) {
    const int64_t all_outputs = backward ? p->K : p->N, width = outputs_of_task(all_outputs, p->M, p->threads);
#pragma omp parallel num_threads(p->threads)
    {
        const codebook code = load_codebook(p->q->code);
        float *tile = p->workspace + THREAD * floats_per_thread(smaller(p->M, ROWS)), *sums = tile + TILE_FLOATS;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t j0 = 0; j0 < all_outputs; j0 += width)
            for (int64_t row0 = 0; row0 < p->M; row0 += ROWS)
                product_block(p, &code, row0, smaller(ROWS, p->M - row0), j0, smaller(width, all_outputs - j0), tile, sums,
                              backward);
    }
}

/* matmul_large.h: the product for many rows, forward and backward. Included by kernels.c alone.

   Blocked as in Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with the weight in
   the place of the matrix that is packed on the way: here it is decoded on the way, a tile at a time, into the cache.

     for every OUT outputs and ROWS rows of x (in parallel; each thread has its own tile of the weight):
       for every STEPS words of the reduction: decode the tile, panels of PANEL outputs: [panel][word][output];
         for every TILE_ROWS rows of x, copied side by side, and every panel:
           TILE_ROWS · 2 accumulators in registers; each word loads 2 vectors of the tile, broadcasts TILE_ROWS of x
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

/* Ahead of time, where stretches are too short for the processor to notice where they lead. */
INLINE void fetch(const char *at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

/* The bytes of LANES rows of Ŵ. */
INLINE void fetch_rows(const product *p, int64_t row, int64_t t0, int64_t steps) {
    for (int i = 0; i < LANES; i++) fetch((const char *)p->q->packed + ((row + i) * p->K + t0) / 2, steps / 2);
}

/* Two steps of LANES outputs into a panel; returned is where the next ones go. */
INLINE float *store_steps(float *panel, vec one, vec other, const int pairs) {
    if (pairs) {
        store(panel, to_pairs(one, other));
        return panel + PANEL;
    }
    store(panel, one);
    store(panel + PANEL, other);
    return panel + 2 * PANEL;
}

/* Ŵ for outputs j0 … and reduction indices t0 …, where a row of Ŵ is an output: LANES rows at a time, so that a level of
   each fills a vector in the order in which the tile has them. Rows beyond the last repeat it; nobody reads them. */
INLINE void decode_tile(const product *p, const codebook *code, int64_t j0, int64_t outputs, int64_t t0, int64_t steps,
                        float *tile, const int pairs) {
    for (int64_t j = 0; j < outputs; j += LANES) {
        float *panel = tile + j / PANEL * TILE_STEPS * PANEL + j % PANEL, scale[LANES];
        int64_t first[LANES];
        if (j + LANES < outputs)
            fetch_rows(p, j0 + j + LANES, t0, steps);
        else if (t0 + steps < p->K)
            fetch_rows(p, j0, t0 + steps, steps);
        for (int i = 0; i < LANES; i++) first[i] = (j0 + smaller(j + i, outputs - 1)) * p->K;
        for (int64_t t = t0; t < t0 + steps; t += 32) {
            const uint8_t *row[LANES];
            if (t == t0 || t % 64 == 0 || p->K % 64 || p->q->shift < 6) /* else no row is in another block */
                for (int i = 0; i < LANES; i++) scale[i] = block_scale(p->q, (first[i] + t) >> p->q->shift);
            for (int i = 0; i < LANES; i++) row[i] = p->q->packed + (first[i] + t) / 2;
            vec scales = load(scale);
            uvec eight[4];
            dwords_of(row, eight);
            for (int d = 0; d < 4; d++)
#pragma GCC unroll 4
                for (int byte = 0; byte < 4; byte++) { /* the high nibble comes first */
                    vec one = look_up(code, eight[d] >> (8 * byte + 4)) * scales;
                    panel = store_steps(panel, one, look_up(code, eight[d] >> 8 * byte) * scales, pairs);
                }
        }
    }
}

/* The 32 weights from `first` on, scaled. */
INLINE void decode32_scaled(const weight *q, const codebook *code, int64_t first, vec *levels) {
    const vec scales = every(block_scale(q, first >> q->shift));
    decode32(q->packed + first / 2, code, levels);
    for (int v = 0; v < 32 / LANES; v++) levels[v] *= scales;
}

/* The same where a row of Ŵ is a reduction step. */
INLINE void decode_tile_dx(const product *p, const codebook *code, int64_t j0, int64_t outputs, int64_t t0,
                           int64_t steps, float *tile, const int pairs) {
    for (int64_t word = 0; word < words_of(steps, pairs); word++)
        for (int64_t j = 0; j < outputs; j += 32) {
            const int64_t step = pairs ? 2 * word : word, first = (t0 + step) * p->K + j0 + j;
            vec one[32 / LANES], other[32 / LANES] = {{0}};
            decode32_scaled(p->q, code, first, one);
            if (pairs && step + 1 < steps) decode32_scaled(p->q, code, first + p->K, other);
            for (int v = 0; v < 32 / LANES; v++) {
                const int64_t at = j + v * LANES;
                store(tile + at / PANEL * TILE_STEPS * PANEL + word * PANEL + at % PANEL,
                      pairs ? to_pairs(one[v], other[v]) : one[v]);
            }
        }
}

/* The tile of a dense weight, forward. */
INLINE void copy_tile(const product *p, int64_t j0, int64_t outputs, int64_t t0, int64_t steps, float *tile,
                      const int pairs) {
    float rows[LANES * X_STEP];
    for (int64_t j = 0; j < outputs; j += LANES) {
        for (int i = 0; i < LANES; i++) {
            const int64_t at = (j0 + smaller(j + i, outputs - 1)) * p->K + t0;
            if (pairs)
                copy_pairs(p->dense, p->dense_dtype, at, steps, rows + i * X_STEP);
            else
                read_row(p->dense, p->dense_dtype, at, steps, rows + i * X_STEP);
        }
        float *panel = tile + j / PANEL * TILE_STEPS * PANEL + j % PANEL;
        for (int64_t t = 0; t < words_of(steps, pairs); t += LANES) transpose(rows + t, X_STEP, panel + t * PANEL);
    }
}

/* Steps t0 … of `up`, as steps of a tile. */
INLINE void copy_up_tile(const product *p, int64_t j0, int64_t outputs, int64_t t0, int64_t steps, float *tile,
                         const int backward, const int pairs) {
    for (int64_t j = 0; j < outputs; j++) {
        float *at = tile + j / PANEL * TILE_STEPS * PANEL + j % PANEL;
        const float *up = p->up + (backward ? t0 * p->K + j0 + j : (j0 + j) * p->r + t0);
        const int64_t step = backward ? p->K : 1;
        for (int64_t t = 0; t < steps; t += 1 + pairs, at += PANEL)
            *at = pairs ? pair(up[t * step], t + 1 < steps ? up[(t + 1) * step] : 0) : up[t * step];
    }
}

/* y[i][j] (+)= Σ_t x[i][t] · w[t][j]: `rows` rows, PANEL outputs, t over words. The sum starts from 0 each time: summing in
   pieces of STEPS loses fewer digits than one long sum. */
INLINE void multiply(const float *x, const float *w, int64_t words, float *y, int64_t y_step, int add, const int rows,
                     const int pairs) {
    vec sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vec){0};
#pragma GCC unroll 4 /* counting each step would take slots from the products */
    for (int64_t t = 0; t < words; t++, w += PANEL) {
        vec w0 = load(w), w1 = load(w + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            vec x_i = every(x[i * X_STEP + t]);
            sum[i][0] = pairs ? dot_pairs(w0, x_i, sum[i][0]) : fma_(w0, x_i, sum[i][0]);
            sum[i][1] = pairs ? dot_pairs(w1, x_i, sum[i][1]) : fma_(w1, x_i, sum[i][1]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < 2; v++) {
            float *at = y + i * y_step + v * LANES;
            store(at, add ? load(at) + sum[i][v] : sum[i][v]);
        }
}

INLINE void multiply_thirds(const float *x, const float *w, int64_t words, float *y, int64_t y_step, int add, int64_t rows,
                            const int pairs) {
    if (rows > 2 * THIRD)
        multiply(x, w, words, y, y_step, add, TILE_ROWS, pairs);
    else if (rows > THIRD)
        multiply(x, w, words, y, y_step, add, 2 * THIRD, pairs);
    else
        multiply(x, w, words, y, y_step, add, THIRD, pairs);
}

static void multiply_rows(const float *x, const float *w, int64_t words, float *y, int64_t y_step, int add,
                          int64_t rows) {
    multiply_thirds(x, w, words, y, y_step, add, rows, 0);
}

static void multiply_pairs(const float *x, const float *w, int64_t words, float *y, int64_t y_step, int add,
                           int64_t rows) {
    multiply_thirds(x, w, words, y, y_step, add, rows, PAIRS);
}

/* The same for rows and outputs that do not fill the registers. */
static void multiply_edge(const float *x, const float *w, int64_t words, float *y, int64_t y_step, int add,
                          int64_t rows, int64_t outputs, int pairs) {
    float whole[TILE_ROWS * PANEL];
    (pairs ? multiply_pairs : multiply_rows)(x, w, words, whole, PANEL, 0, rows);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < outputs; j++)
            y[i * y_step + j] = add ? y[i * y_step + j] + whole[i * PANEL + j] : whole[i * PANEL + j];
}

/* Columns t0 … of `rows` rows, which are `length` long, side by side. */
INLINE void copy_columns(const void *x, int dtype, int64_t length, int64_t t0, int64_t steps, int64_t rows, float *out,
                         const int pairs) {
    for (int64_t i = 0; i < rows; i++, out += X_STEP) {
        const int64_t at = i * length + t0;
        int64_t t = 0;
        if (pairs) {
            copy_pairs(x, dtype, at, steps, out);
            continue;
        }
        if (dtype == FP32) /* memcpy takes long to start */
            for (; t + LANES <= steps; t += LANES) store(out + t, load((const float *)x + at + t));
        if (t < steps) read_row(x, dtype, at + t, steps - t, out + t);
    }
}

/* Rows of x that meet a tile: columns t0 … t0 + steps of x, then columns low0 … of `low`. */
typedef struct {
    const void *x;
    int dtype;
    int64_t length, t0, steps;
    const float *low;
    int64_t r, low0, low_steps;
} columns;

/* y (rows, outputs) (+)= these columns · tile. */
INLINE void multiply_tile(const columns *c, int64_t rows, const float *tile, int64_t outputs, float *y, int64_t y_step,
                          int add, const int pairs) {
    const int64_t size = c->dtype == FP32 ? 4 : 2, own = words_of(c->steps, pairs);
    const int64_t words = own + words_of(c->low_steps, pairs);
    float x_tile[TILE_ROWS * X_STEP];
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        int64_t here = smaller(TILE_ROWS, rows - row), next = row + here;
        const char *x = (const char *)c->x + row * c->length * size;
        copy_columns(x, c->dtype, c->length, c->t0, c->steps, here, x_tile, pairs);
        copy_columns(c->low + row * c->r, FP32, c->r, c->low0, c->low_steps, here, x_tile + own, pairs);
        for (int64_t j = 0; j < outputs; j += PANEL) {
            const float *panel = tile + j * TILE_STEPS;
            float *at = y + row * y_step + j;
            if (add)
                for (int64_t i = 0; i < here; i++) fetch((const char *)(at + i * y_step), 4 * PANEL);
            for (int64_t i = 0; i < THIRD && next < rows && next < row + 2 * TILE_ROWS; i++, next++)
                fetch((const char *)c->x + (next * c->length + c->t0) * size, c->steps * size);
            if (here % THIRD || outputs - j < PANEL)
                multiply_edge(x_tile, panel, words, at, y_step, add, here, smaller(PANEL, outputs - j), pairs);
            else
                (pairs ? multiply_pairs : multiply_rows)(x_tile, panel, words, at, y_step, add, here);
        }
    }
}

static void add_bias(float *y, int64_t y_step, int64_t rows, int64_t outputs, const float *bias) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < outputs; j++) y[i * y_step + j] += bias[j];
}

/* Rows row0 … and outputs j0 … of y. */
INLINE void product_block(const product *p, const codebook *code, int64_t row0, int64_t rows, int64_t j0,
                          int64_t outputs, float *tile, float *sums, const int backward, const int pairs) {
    const int64_t length = backward ? p->N : p->K, all_outputs = backward ? p->K : p->N;
    const int64_t most = pairs ? 2 * STEPS : STEPS;
    const void *x = (const char *)p->x + row0 * length * (p->dtype == FP32 ? 4 : 2);
    const int64_t y_step = p->y_dtype == FP32 ? all_outputs : OUT;
    float *y = p->y_dtype == FP32 ? (float *)p->y + row0 * all_outputs + j0 : sums;
    columns c = {x, p->dtype, length, 0, 0, p->low + row0 * p->r, p->r, 0, 0};
    for (; c.t0 < length; c.t0 += c.steps) {
        c.steps = smaller(most, length - c.t0);
        if (backward)
            decode_tile_dx(p, code, j0, outputs, c.t0, c.steps, tile, pairs);
        else if (p->q)
            decode_tile(p, code, j0, outputs, c.t0, c.steps, tile, pairs);
        else
            copy_tile(p, j0, outputs, c.t0, c.steps, tile, pairs);
        if (c.t0 + c.steps == length && p->r <= ROOM) {
            c.low_steps = p->r;
            copy_up_tile(p, j0, outputs, 0, p->r, tile + words_of(c.steps, pairs) * PANEL, backward, pairs);
        }
        multiply_tile(&c, rows, tile, outputs, y, y_step, c.t0 > 0, pairs);
    }
    for (c.steps = 0, c.low0 = c.low_steps; c.low0 < p->r; c.low0 += c.low_steps) {
        c.low_steps = smaller(most, p->r - c.low0);
        copy_up_tile(p, j0, outputs, c.low0, c.low_steps, tile, backward, pairs);
        multiply_tile(&c, rows, tile, outputs, y, y_step, 1, pairs);
    }
    if (p->bias) add_bias(y, y_step, rows, outputs, p->bias + j0);
    if (p->y_dtype != FP32)
        for (int64_t i = 0; i < rows; i++)
            write_row(sums + i * OUT, outputs, p->y, p->y_dtype, (row0 + i) * all_outputs + j0);
}

/* Outputs of a task: where the thread with most tasks has least to do. A multiple of PANEL, and of the 32 weights
   decoded at once; each task reads x, as if that were EXTRA outputs more. */
static int64_t outputs_of_task(int64_t all_outputs, int64_t row_blocks, int threads) {
    enum { EXTRA = 8 };
    int64_t best = OUT, least = INT64_MAX;
    for (int64_t width = OUT; width >= 32; width -= 32) {
        int64_t tasks = (all_outputs + width - 1) / width * row_blocks, turns = (tasks + threads - 1) / threads;
        if (turns * (width + EXTRA) < least) least = turns * (width + EXTRA), best = width;
    }
    return best;
}

INLINE void many_rows(const product *p, const int backward) {
    const int64_t row_blocks = (p->M + ROWS - 1) / ROWS, all_outputs = backward ? p->K : p->N;
    const int64_t rows = ((p->M + row_blocks - 1) / row_blocks + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    const int64_t width = outputs_of_task(all_outputs, row_blocks, p->threads);
#pragma omp parallel num_threads(p->threads)
    {
        const codebook code = load_codebook(p->q ? p->q->code : (const float[16]){0});
        float *tile = p->workspace + THREAD * floats_per_thread(smaller(p->M, ROWS)), *sums = tile + TILE_FLOATS;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t j0 = 0; j0 < all_outputs; j0 += width)
            for (int64_t row0 = 0; row0 < p->M; row0 += rows) {
                const int64_t here = smaller(rows, p->M - row0), outputs = smaller(width, all_outputs - j0);
                if (PAIRS && in_pairs(p))
                    product_block(p, &code, row0, here, j0, outputs, tile, sums, backward, PAIRS);
                else
                    product_block(p, &code, row0, here, j0, outputs, tile, sums, backward, 0);
            }
    }
}

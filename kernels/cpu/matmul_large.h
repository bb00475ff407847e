/* matmul_large.h: the product for many rows, forward and backward. Included by kernels.c alone.

   Blocked as in Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with the weight in
   the place of the matrix that is packed on the way: here it is decoded on the way, a tile at a time, into the cache.

     rows of x are packed once into panels of PANEL, transposed: a vector holds LANES rows at one reduction index
     for every tile of OUT outputs (in parallel; each thread has its own tile and accumulators):
       for every REDUCE steps of the reduction: decode the tile, then for every panel and every TILE_OUT outputs:
         TILE_OUT · 2 accumulators in registers; each step loads 2 vectors of x and broadcasts TILE_OUT weights
       low-rank terms go on as further reduction steps, over `low` and `up`
       accumulators, transposed back, plus bias, to y

   Every output is summed in index order by one thread: it does not depend on how many threads there are. */

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

/* x[row][at …] of `rows` rows → packed: for every REDUCE steps, for every panel, [step][row in panel]. */
static void pack_chunk(const void *x, int dtype, int64_t length, int64_t rows, int64_t at, float *packed) {
    int64_t steps = smaller(REDUCE, length - at), panels = panels_of(rows);
    float row[REDUCE];
    packed += at * panels * PANEL;
    for (int64_t i = 0; i < panels * PANEL; i++) {
        if (i < rows)
            read_row(x, dtype, i * length + at, steps, row);
        else
            memset(row, 0, sizeof row);
        float *column = packed + (i / PANEL) * steps * PANEL + i % PANEL;
        for (int64_t t = 0; t < steps; t++) column[t * PANEL] = row[t];
    }
}

/* acc[j][row] += Σ_t w[j · out_step + t · step] · x[t][row]: TILE_OUT outputs, `vecs` vectors of rows. The sum starts
   from 0 each time: summing in pieces of REDUCE loses fewer digits than one long sum. */
INLINE void multiply(const float *w, int64_t out_step, int64_t step, const float *x, int64_t steps, float *acc,
                     const int vecs) {
    vec sum[TILE_OUT][2];
#pragma GCC unroll 12
    for (int j = 0; j < TILE_OUT; j++)
        for (int v = 0; v < vecs; v++) sum[j][v] = (vec){0};
    for (int64_t t = 0; t < steps; t++, x += PANEL, w += step) {
        vec x0 = load(x), x1 = vecs == 2 ? load(x + LANES) : x0;
#pragma GCC unroll 12
        for (int j = 0; j < TILE_OUT; j++) {
            vec weight_of_j = every(w[j * out_step]);
            sum[j][0] = fma_(x0, weight_of_j, sum[j][0]);
            if (vecs == 2) sum[j][1] = fma_(x1, weight_of_j, sum[j][1]);
        }
    }
#pragma GCC unroll 12
    for (int j = 0; j < TILE_OUT; j++)
        for (int v = 0; v < vecs; v++) {
            float *at = acc + j * PANEL + v * LANES;
            store(at, load(at) + sum[j][v]);
        }
}

INLINE void multiply_tile(const float *tile, int64_t outputs, int64_t rows, const float *x, int64_t steps, float *acc,
                          const int backward) {
    int64_t panels = panels_of(rows), out_step = backward ? 1 : ROW_STEP;
    for (int64_t panel = 0; panel < panels; panel++, x += steps * PANEL)
        for (int64_t j = 0; j < outputs; j += TILE_OUT) {
            float *sums = acc + j * panels * PANEL + panel * TILE_OUT * PANEL;
            if (rows - panel * PANEL > LANES)
                multiply(tile + j * out_step, out_step, backward ? OUT : 1, x, steps, sums, 2);
            else
                multiply(tile + j * out_step, out_step, backward ? OUT : 1, x, steps, sums, 1);
        }
}

/* Ŵ for outputs j0 … and reduction indices t0 …: [output][step] in forward, [step][output] in backward. */
INLINE void decode_tile(const product *p, const codebook *code, int64_t j0, int64_t outputs, int64_t t0, int64_t steps,
                        float *tile, const int backward) {
    if (backward)
        for (int64_t t = 0; t < steps; t++) decode_span(p->q, code, (t0 + t) * p->K + j0, outputs, tile + t * OUT);
    else
        for (int64_t j = 0; j < outputs; j++) decode_span(p->q, code, (j0 + j) * p->K + t0, steps, tile + j * ROW_STEP);
}

INLINE void copy_up_tile(const product *p, int64_t j0, int64_t outputs, int64_t t0, int64_t steps, float *tile,
                         const int backward) {
    if (backward)
        for (int64_t t = 0; t < steps; t++)
            memcpy(tile + t * OUT, p->up + (t0 + t) * p->K + j0, 4 * (size_t)outputs);
    else
        for (int64_t j = 0; j < outputs; j++)
            memcpy(tile + j * ROW_STEP, p->up + (j0 + j) * p->r + t0, 4 * (size_t)steps);
}

/* acc → y[row][j0 …], transposed back a panel at a time. */
static void write_tile(const product *p, const float *acc, int64_t j0, int64_t outputs, int64_t all_outputs,
                       int64_t row0, int64_t rows) {
    float lines[PANEL][OUT];
    for (int64_t panel = 0; panel < panels_of(rows); panel++) {
        for (int64_t j = 0; j < outputs; j += TILE_OUT) {
            const float *sums = acc + j * panels_of(rows) * PANEL + panel * TILE_OUT * PANEL;
            for (int i = 0; i < PANEL; i++)
                for (int t = 0; t < TILE_OUT; t++) lines[i][j + t] = sums[t * PANEL + i];
        }
        for (int64_t i = 0; i < smaller(PANEL, rows - panel * PANEL); i++) {
            if (p->bias)
                for (int64_t j = 0; j < outputs; j++) lines[i][j] += p->bias[j0 + j];
            write_row(lines[i], outputs, p->y, p->dtype, (row0 + panel * PANEL + i) * all_outputs + j0);
        }
    }
}

INLINE void sweep(const product *p, int64_t row0, int64_t rows, const int backward) {
    const int64_t length = backward ? p->N : p->K, all_outputs = backward ? p->K : p->N, panels = panels_of(rows);
    float *x = p->workspace, *low = x + length * panels * PANEL, *scratch = low + p->r * panels * PANEL;
    const char *rows_of_x = (const char *)p->x + row0 * length * (p->dtype == FP32 ? 4 : 2);
#pragma omp parallel num_threads(p->threads)
    {
        const codebook code = load_codebook(p->q->code);
        float *tile = scratch + THREAD * floats_per_thread(panels), *acc = tile + TILE_FLOATS;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < length; t += REDUCE) pack_chunk(rows_of_x, p->dtype, length, rows, t, x);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < p->r; t += REDUCE) pack_chunk(p->low + row0 * p->r, FP32, p->r, rows, t, low);
#pragma omp for schedule(dynamic)
        for (int64_t j0 = 0; j0 < all_outputs; j0 += OUT) {
            int64_t outputs = smaller(OUT, all_outputs - j0);
            if (outputs < OUT) memset(tile, 0, 4 * TILE_FLOATS);
            memset(acc, 0, 4 * (size_t)(OUT * panels * PANEL));
            for (int64_t t = 0; t < length; t += REDUCE) {
                int64_t steps = smaller(REDUCE, length - t);
                decode_tile(p, &code, j0, outputs, t, steps, tile, backward);
                multiply_tile(tile, outputs, rows, x + t * panels * PANEL, steps, acc, backward);
            }
            for (int64_t t = 0; t < p->r; t += REDUCE) {
                int64_t steps = smaller(REDUCE, p->r - t);
                copy_up_tile(p, j0, outputs, t, steps, tile, backward);
                multiply_tile(tile, outputs, rows, low + t * panels * PANEL, steps, acc, backward);
            }
            write_tile(p, acc, j0, outputs, all_outputs, row0, rows);
        }
    }
}

/* attention.h: causal attention over whole rows, forward and backward, for fp32. Included by kernels.c alone.

     S = q kᵀ / √Dh (key ≤ query),  P = softmax(S),  y = P v                       lse = log Σ e^S, kept for backward
     dv = Pᵀ dy,  dS = P ⊙ (dy vᵀ - Σ dy ⊙ y),  dq = dS k / √Dh,  dk = dSᵀ q / √Dh

   q, y and their gradients (B, T, H, Dh), k, v and theirs (B, T, Kv, Dh), lse (B, H, T). The products are those of
   matmul_large.h: TILE_ROWS rows against panels of PANEL outputs, and nothing above the diagonal but in a tile that the
   diagonal crosses. Nothing of T · T is kept: forward holds the scores of TILE_ROWS queries, backward dS of REDUCE queries
   (as FlashAttention, arXiv 2205.14135, in blocks that suit a cache). A task is a key-value head of a row with the
   queries that share it, and is one thread's. */

typedef struct {
    int64_t B, T, H, Kv, Dh;
    const float *q, *k, *v;
    float *y, *lse, *workspace;
    const float *dy;
    float *dq, *dk, *dv;
    int threads;
} attention;

INLINE int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* n rows of Dh numbers, scaled → panels of rows, [panel][d][row in panel]; zeros beyond n. */
static void pack_across(const float *rows, int64_t row_step, int64_t n, int64_t Dh, float scale, float *panels) {
    float block[LANES * REDUCE];
    for (int64_t j = 0; j < up_to(n, PANEL); j += LANES) {
        for (int64_t i = 0; i < LANES; i++)
            for (int64_t d = 0; d < Dh; d++) block[i * Dh + d] = j + i < n ? rows[(j + i) * row_step + d] * scale : 0;
        for (int64_t d = 0; d < Dh; d += LANES)
            transpose(block + d, Dh, panels + (j / PANEL * Dh + d) * PANEL + j % PANEL);
    }
}

/* The same → panels of columns, [panel][row][d in panel], `length` rows each. */
static void pack_along(const float *rows, int64_t row_step, int64_t n, int64_t Dh, float scale, int64_t length,
                       float *panels) {
    for (int64_t d0 = 0; d0 < Dh; d0 += PANEL, panels += length * PANEL)
        for (int64_t i = 0; i < n; i++)
            for (int64_t d = 0; d < PANEL; d++) panels[i * PANEL + d] = rows[i * row_step + d0 + d] * scale;
}

static void copy_rows(const float *rows, int64_t row_step, int64_t n, int64_t Dh, float scale, float *tile) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < Dh; d++) tile[i * X_STEP + d] = rows[i * row_step + d] * scale;
}

/* Score of key j of one query: they lie in chunks of REDUCE keys, [chunk][query][key]. */
INLINE float *score_at(float *scores, int64_t j) { return scores + j / REDUCE * TILE_ROWS * X_STEP + j % REDUCE; }

/* Of n scores: e^(score - largest), zeros up to `end`. Returns 1 / their sum; *lse = log of the sum of e^score. */
static float softmax_scores(float *scores, int64_t n, int64_t end, float *lse) {
    float largest = -INFINITY;
    double total = 0;
    for (int64_t j = 0; j < n; j += REDUCE) {
        float here = largest_of(score_at(scores, j), smaller(REDUCE, n - j));
        largest = here > largest ? here : largest;
    }
    for (int64_t j = n; j < end; j++) *score_at(scores, j) = -INFINITY;
    for (int64_t j = 0; j < end; j += REDUCE) {
        float *at = score_at(scores, j);
        vec sum = {0};
        for (int64_t i = 0; i < smaller(REDUCE, end - j); i += LANES) {
            vec s = load(at + i), p = choose(s == every(-INFINITY), (vec){0}, exp_(s - every(largest)));
            store(at + i, p);
            sum += p;
        }
        total += sum_lanes(sum);
    }
    *lse = largest + (float)log(total);
    return (float)(1 / total);
}

INLINE int64_t forward_floats(const attention *a) {
    return 2 * up_to(a->T, PANEL) * a->Dh + up_to(a->T, REDUCE) / REDUCE * TILE_ROWS * X_STEP;
}

static void attention_forward(const attention *a, int64_t b, int64_t kv, float *k_panels) {
    const int64_t T = a->T, Dh = a->Dh, group = a->H / a->Kv, padded = up_to(T, PANEL);
    const int64_t kv_step = a->Kv * Dh, q_step = a->H * Dh, kv_at = b * T * kv_step + kv * Dh;
    float *v_panels = k_panels + padded * Dh, *scores = v_panels + padded * Dh;
    float q_tile[TILE_ROWS * X_STEP], out[TILE_ROWS * PANEL], inverse[TILE_ROWS];
    pack_across(a->k + kv_at, kv_step, T, Dh, 1, k_panels);
    pack_along(a->v + kv_at, kv_step, T, Dh, 1, padded, v_panels);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++)
        for (int64_t i0 = 0; i0 < T; i0 += TILE_ROWS) {
            const int64_t rows = smaller(TILE_ROWS, T - i0), keys = i0 + rows, end = up_to(keys, PANEL);
            const int64_t at = b * T * q_step + i0 * q_step + h * Dh;
            copy_rows(a->q + at, q_step, rows, Dh, 1 / sqrtf((float)Dh), q_tile);
            for (int64_t j = 0; j < end; j += PANEL)
                multiply_rows(q_tile, k_panels + j * Dh, Dh, score_at(scores, j), X_STEP, 0, rows);
            for (int64_t i = 0; i < rows; i++)
                inverse[i] = softmax_scores(scores + i * X_STEP, i0 + i + 1, end, a->lse + (b * a->H + h) * T + i0 + i);
            for (int64_t d = 0; d < Dh; d += PANEL) {
                for (int64_t j = 0; j < keys; j += REDUCE)
                    multiply_rows(score_at(scores, j), v_panels + d * padded + j * PANEL, smaller(REDUCE, keys - j), out,
                                  PANEL, j > 0, rows);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t e = 0; e < PANEL; e++) a->y[at + i * q_step + d + e] = out[i * PANEL + e] * inverse[i];
            }
        }
}

/* y[i][e] = Σ_t x[t][i] · w[t][e], for TILE_ROWS columns i of x and PANEL outputs. */
static void multiply_columns(const float *x, const float *w, int64_t steps, float *y) {
    vec sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < TILE_ROWS; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int64_t t = 0; t < steps; t++, x += X_STEP, w += PANEL) {
        vec w0 = load(w), w1 = load(w + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; i++) {
            vec x_i = every(x[i]);
            sum[i][0] = fma_(w0, x_i, sum[i][0]);
            sum[i][1] = fma_(w1, x_i, sum[i][1]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < TILE_ROWS; i++) store(y + i * PANEL, sum[i][0]), store(y + i * PANEL + LANES, sum[i][1]);
}

/* Places in a thread's workspace. Queries are taken REDUCE at a time. */
typedef struct {
    float *k_panels, *q_across, *dy_across, *q_along, *dy_along, *dk, *dv, *ds, *p, *lse, *along;
} scratch;

INLINE int64_t backward_floats(const attention *a, float *start, scratch *s) {
    const int64_t all = up_to(a->T, TILE_ROWS) * a->Dh, chunk = REDUCE * a->Dh;
    float *at = start;
    s->k_panels = at, at += all;
    s->q_across = at, at += chunk;
    s->dy_across = at, at += chunk;
    s->q_along = at, at += chunk;
    s->dy_along = at, at += chunk;
    s->dk = at, at += all;
    s->dv = at, at += all;
    s->ds = at, at += up_to(a->T, TILE_ROWS) * X_STEP;
    s->p = at, at += TILE_ROWS * X_STEP;
    s->lse = at, at += REDUCE;
    s->along = at, at += REDUCE;
    return at - start;
}

/* Queries i0 … i0 + n of a head: packed in each of the two ways, with their lse and Σ dy ⊙ y. */
static void read_queries(const attention *a, int64_t b, int64_t h, int64_t i0, int64_t n, const scratch *s) {
    const int64_t Dh = a->Dh, step = a->H * Dh, at = (b * a->T + i0) * step + h * Dh;
    const float scale = 1 / sqrtf((float)Dh);
    pack_across(a->q + at, step, n, Dh, scale, s->q_across);
    pack_across(a->dy + at, step, n, Dh, 1, s->dy_across);
    pack_along(a->q + at, step, n, Dh, scale, REDUCE, s->q_along);
    pack_along(a->dy + at, step, n, Dh, 1, REDUCE, s->dy_along);
    for (int64_t i = 0; i < REDUCE; i++) { /* beyond the last query: P and dS are nothing */
        s->lse[i] = i < n ? a->lse[(b * a->H + h) * a->T + i0 + i] : INFINITY;
        s->along[i] = i < n ? dot(a->dy + at + i * step, a->y + at + i * step, Dh) : 0;
    }
}

/* TILE_ROWS keys from j0 on against n queries from i0 on: P and dS of this tile, [key][query]; then dk and dv. */
static void backward_tile(const attention *a, const float *k_tile, const float *v_tile, int64_t j0, int64_t keys,
                          int64_t i0, int64_t n, const scratch *s) {
    const int64_t Dh = a->Dh, first = j0 > i0 ? (j0 - i0) / PANEL * PANEL : 0;
    float *ds = s->ds + j0 * X_STEP, *p = s->p;
    for (int64_t i = first; i < n; i += PANEL) {
        multiply_rows(k_tile, s->q_across + i * Dh, Dh, p + i, X_STEP, 0, keys);
        multiply_rows(v_tile, s->dy_across + i * Dh, Dh, ds + i, X_STEP, 0, keys);
    }
    float query[LANES];
    for (int64_t i = first; i < up_to(n, PANEL); i += LANES) {
        for (int j = 0; j < LANES; j++) query[j] = (float)(i0 + i + j - j0);
        for (int64_t j = 0; j < keys; j++) {
            vec probability = exp_(load(p + j * X_STEP + i) - load(s->lse + i));
            probability = choose(load(query) >= every((float)j), probability, (vec){0});
            store(p + j * X_STEP + i, probability);
            store(ds + j * X_STEP + i, probability * (load(ds + j * X_STEP + i) - load(s->along + i)));
        }
    }
    for (int64_t d = 0; d < Dh; d += PANEL) {
        const int64_t from = d * REDUCE + first * PANEL;
        multiply_rows(p + first, s->dy_along + from, n - first, s->dv + j0 * Dh + d, Dh, 1, keys);
        multiply_rows(ds + first, s->q_along + from, n - first, s->dk + j0 * Dh + d, Dh, 1, keys);
    }
}

static void attention_backward(const attention *a, int64_t b, int64_t kv, float *start) {
    const int64_t T = a->T, Dh = a->Dh, group = a->H / a->Kv, padded = up_to(T, TILE_ROWS);
    const int64_t kv_step = a->Kv * Dh, q_step = a->H * Dh, kv_at = b * T * kv_step + kv * Dh;
    const float scale = 1 / sqrtf((float)Dh);
    float k_tile[TILE_ROWS * X_STEP], v_tile[TILE_ROWS * X_STEP], out[TILE_ROWS * PANEL];
    scratch s;
    backward_floats(a, start, &s);
    pack_along(a->k + kv_at, kv_step, T, Dh, 1, padded, s.k_panels);
    memset(s.dk, 0, 4 * (size_t)(padded * Dh)), memset(s.dv, 0, 4 * (size_t)(padded * Dh));
    for (int64_t h = kv * group; h < (kv + 1) * group; h++)
        for (int64_t i0 = 0; i0 < T; i0 += REDUCE) {
            const int64_t n = smaller(REDUCE, T - i0);
            read_queries(a, b, h, i0, n, &s);
            for (int64_t j0 = 0; j0 < i0 + n; j0 += TILE_ROWS) {
                const int64_t keys = smaller(TILE_ROWS, T - j0);
                copy_rows(a->k + kv_at + j0 * kv_step, kv_step, keys, Dh, 1, k_tile);
                copy_rows(a->v + kv_at + j0 * kv_step, kv_step, keys, Dh, 1, v_tile);
                backward_tile(a, k_tile, v_tile, j0, keys, i0, n, &s);
            }
            for (int64_t i = 0; i < n; i += TILE_ROWS)
                for (int64_t d = 0; d < Dh; d += PANEL) {
                    multiply_columns(s.ds + i, s.k_panels + d * padded, smaller(T, i0 + i + TILE_ROWS), out);
                    for (int64_t row = 0; row < smaller(TILE_ROWS, n - i); row++)
                        for (int64_t e = 0; e < PANEL; e++)
                            a->dq[(b * T + i0 + i + row) * q_step + h * Dh + d + e] = out[row * PANEL + e] * scale;
                }
        }
    for (int64_t j = 0; j < T; j++) {
        memcpy(a->dk + kv_at + j * kv_step, s.dk + j * Dh, 4 * (size_t)Dh);
        memcpy(a->dv + kv_at + j * kv_step, s.dv + j * Dh, 4 * (size_t)Dh);
    }
}

/* Floats of the workspace of either. */
int64_t FOR_ISA(attention_floats)(const attention *a, int backward) {
    scratch s;
    return a->threads * (backward ? backward_floats(a, a->workspace, &s) : forward_floats(a));
}

void FOR_ISA(attention)(const attention *a) {
#pragma omp parallel for num_threads(a->threads) schedule(dynamic)
    for (int64_t task = 0; task < a->B * a->Kv; task++)
        attention_forward(a, task / a->Kv, task % a->Kv, a->workspace + THREAD * forward_floats(a));
}

void FOR_ISA(attention_dx)(const attention *a) {
    scratch s;
    const int64_t floats = backward_floats(a, a->workspace, &s);
#pragma omp parallel for num_threads(a->threads) schedule(dynamic)
    for (int64_t task = 0; task < a->B * a->Kv; task++)
        attention_backward(a, task / a->Kv, task % a->Kv, a->workspace + THREAD * floats);
}

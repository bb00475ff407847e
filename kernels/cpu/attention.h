/* attention.h: causal attention of documents, forward and backward, for fp32. Included by kernels.c alone.

     S = q kᵀ / √Dh (key ≤ query),  P = softmax(S),  y = P v                       lse = log Σ e^S, kept for backward
     dv = Pᵀ dy,  dS = P ⊙ (dy vᵀ - Σ dy ⊙ y),  dq = dS k / √Dh,  dk = dSᵀ q / √Dh

   q, y and their gradients (tokens, H, Dh), k, v and theirs (tokens, Kv, Dh), lse (tokens, H). The products are those
   of matmul_large.h: TILE_ROWS rows against panels of PANEL outputs, and nothing above the diagonal but in a tile that
   the diagonal crosses. Nothing of T · T is kept: forward holds the scores of TILE_ROWS queries, backward dS of REDUCE
   queries (as FlashAttention, arXiv 2205.14135, in blocks that suit a cache).

   A document may continue another one, its prefix: its keys are those of the prefix, then its own. A task is a piece of
   a document with one key-value head, and is one thread's; its queries are those of each of its tokens by every head
   that shares the keys, [token][head]. What backward adds to keys before the piece's own it leaves in sums of its own.
   When all tasks are done, those are added in the order of the pieces: no result depends on how many threads there are,
   and that of a document depends on no other one but its prefix, and what continues it. */

typedef struct {
    int64_t prefix, prefix_length; /* first token, tokens: 0 where there is none */
    int64_t first, before, length; /* the document's first token, its tokens before this piece, tokens of the piece */
    int64_t sums;                  /* keys before their own that the pieces before it have: where its sums start */
} piece;

typedef struct {
    int64_t n, H, Kv, Dh;
    const piece *pieces;
    const float *q, *k, *v;
    float *y, *lse, *workspace;
    const float *dy;
    float *dq, *dk, *dv, *sums;
    int threads;
} attention;

INLINE int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

INLINE int64_t earlier_keys(const piece *p) { return p->prefix_length + p->before; }
INLINE int64_t keys_of(const piece *p) { return earlier_keys(p) + p->length; }

/* Where the numbers of its key j lie in k, v, dk and dv. */
INLINE int64_t key_place(const attention *a, const piece *p, int64_t kv, int64_t j) {
    const int64_t own = j - p->prefix_length;
    return ((own < 0 ? p->prefix + j : p->first + own) * a->Kv + kv) * a->Dh;
}

/* Where those of queries i0 … i0 + n lie in q, y, dq and dy; and how many keys each of them sees. */
static void query_places(const attention *a, const piece *p, int64_t kv, int64_t i0, int64_t n, int64_t *at,
                         int64_t *seen) {
    const int64_t group = a->H / a->Kv;
    for (int64_t i = 0, token = p->before + i0 / group, head = i0 % group; i < n; i++) {
        at[i] = ((p->first + token) * a->H + kv * group + head) * a->Dh;
        seen[i] = p->prefix_length + token + 1;
        if (++head == group) head = 0, token++;
    }
}

/* n rows of Dh numbers, scaled → panels of rows, [panel][d][row in panel]; zeros beyond n. */
static void pack_across(const float *x, const int64_t *at, int64_t n, int64_t Dh, float scale, float *panels) {
    float block[LANES * REDUCE];
    for (int64_t j = 0; j < up_to(n, PANEL); j += LANES) {
        for (int64_t i = 0; i < LANES; i++) {
            const float *row = j + i < n ? x + at[j + i] : NULL;
            for (int64_t d = 0; d < Dh; d += LANES)
                store(block + i * Dh + d, row ? load(row + d) * every(scale) : (vec){0});
        }
        for (int64_t d = 0; d < Dh; d += LANES)
            transpose(block + d, Dh, panels + (j / PANEL * Dh + d) * PANEL + j % PANEL);
    }
}

/* The same → panels of columns, [panel][row][d in panel], `length` rows each. */
static void pack_along(const float *x, const int64_t *at, int64_t n, int64_t Dh, float scale, int64_t length,
                       float *panels) {
    for (int64_t d0 = 0; d0 < Dh; d0 += PANEL, panels += length * PANEL)
        for (int64_t i = 0; i < n; i++)
            for (int64_t d = 0; d < PANEL; d += LANES)
                store(panels + i * PANEL + d, load(x + at[i] + d0 + d) * every(scale));
}

static void copy_rows(const float *x, const int64_t *at, int64_t n, int64_t Dh, float scale, float *tile) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < Dh; d += LANES) store(tile + i * X_STEP + d, load(x + at[i] + d) * every(scale));
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

/* Keys of the piece that has most of them. */
static int64_t most_keys(const attention *a) {
    int64_t most = 0;
    for (int64_t i = 0; i < a->n; i++) most = keys_of(a->pieces + i) > most ? keys_of(a->pieces + i) : most;
    return most;
}

INLINE int64_t forward_floats(int64_t keys, int64_t Dh) {
    return up_to(2 * keys, PANEL) + 2 * up_to(keys, PANEL) * Dh + up_to(keys, REDUCE) / REDUCE * TILE_ROWS * X_STEP;
}

static void attention_forward(const attention *a, const piece *p, int64_t kv, float *start) {
    const int64_t all = keys_of(p), Dh = a->Dh, queries = p->length * (a->H / a->Kv), padded = up_to(all, PANEL);
    int64_t *key_at = (int64_t *)start, query_at[TILE_ROWS], seen[TILE_ROWS];
    float *k_panels = start + up_to(2 * all, PANEL), *v_panels = k_panels + padded * Dh;
    float *scores = v_panels + padded * Dh;
    float q_tile[TILE_ROWS * X_STEP], out[TILE_ROWS * PANEL], inverse[TILE_ROWS];
    for (int64_t j = 0; j < all; j++) key_at[j] = key_place(a, p, kv, j);
    pack_across(a->k, key_at, all, Dh, 1, k_panels);
    pack_along(a->v, key_at, all, Dh, 1, padded, v_panels);
    for (int64_t i0 = 0; i0 < queries; i0 += TILE_ROWS) {
        const int64_t rows = smaller(TILE_ROWS, queries - i0);
        query_places(a, p, kv, i0, rows, query_at, seen);
        const int64_t keys = seen[rows - 1], end = up_to(keys, PANEL);
        copy_rows(a->q, query_at, rows, Dh, 1 / sqrtf((float)Dh), q_tile);
        for (int64_t j = 0; j < end; j += PANEL)
            multiply_rows(q_tile, k_panels + j * Dh, Dh, score_at(scores, j), X_STEP, 0, rows);
        for (int64_t i = 0; i < rows; i++)
            inverse[i] = softmax_scores(scores + i * X_STEP, seen[i], end, a->lse + query_at[i] / Dh);
        for (int64_t e0 = 0; e0 < Dh; e0 += PANEL) {
            for (int64_t j = 0; j < keys; j += REDUCE)
                multiply_rows(score_at(scores, j), v_panels + e0 * padded + j * PANEL, smaller(REDUCE, keys - j), out,
                              PANEL, j > 0, rows);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t e = 0; e < PANEL; e++) a->y[query_at[i] + e0 + e] = out[i * PANEL + e] * inverse[i];
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

/* Places in a thread's workspace, which backward_floats sets. Queries are taken REDUCE at a time. */
typedef struct {
    float *k_panels, *q_across, *dy_across, *q_along, *dy_along, *dk, *dv, *ds, *p, *lse, *along, *seen;
    int64_t *key_at, *query_at;
} scratch;

INLINE int64_t backward_floats(int64_t keys, int64_t Dh, float *start, scratch *s) {
    const int64_t rows = up_to(keys, TILE_ROWS), all = rows * Dh, chunk = REDUCE * Dh;
    float *at = start;
    s->key_at = (int64_t *)at, at += up_to(2 * rows, PANEL);
    s->query_at = (int64_t *)at, at += 2 * REDUCE;
    s->k_panels = at, at += all;
    s->q_across = at, at += chunk;
    s->dy_across = at, at += chunk;
    s->q_along = at, at += chunk;
    s->dy_along = at, at += chunk;
    s->dk = at, at += all;
    s->dv = at, at += all;
    s->ds = at, at += rows * X_STEP;
    s->p = at, at += TILE_ROWS * X_STEP;
    s->lse = at, at += REDUCE;
    s->along = at, at += REDUCE;
    s->seen = at, at += REDUCE;
    return at - start;
}

/* Queries i0 … i0 + n: packed in each of the two ways, with their lse and Σ dy ⊙ y. Returns how many keys the last of
   them sees. */
static int64_t read_queries(const attention *a, const piece *p, int64_t kv, int64_t i0, int64_t n, const scratch *s) {
    const int64_t Dh = a->Dh;
    const float scale = 1 / sqrtf((float)Dh);
    int64_t seen[REDUCE];
    query_places(a, p, kv, i0, n, s->query_at, seen);
    pack_across(a->q, s->query_at, n, Dh, scale, s->q_across);
    pack_across(a->dy, s->query_at, n, Dh, 1, s->dy_across);
    pack_along(a->q, s->query_at, n, Dh, scale, REDUCE, s->q_along);
    pack_along(a->dy, s->query_at, n, Dh, 1, REDUCE, s->dy_along);
    for (int64_t i = 0; i < n; i++) {
        s->lse[i] = a->lse[s->query_at[i] / Dh];
        s->along[i] = dot(a->dy + s->query_at[i], a->y + s->query_at[i], Dh);
        s->seen[i] = (float)seen[i];
    }
    for (int64_t i = n; i < REDUCE; i++) s->lse[i] = INFINITY, s->along[i] = s->seen[i] = 0; /* P and dS are nothing */
    return seen[n - 1];
}

/* Keys j0 … of a tile against queries `first` … n, a whole number of panels on from 0: P and dS of this tile,
   [key][query]; then dk and dv. dS of the panel before, none of which sees them, may be read too, and is set to 0. */
static void backward_tile(const attention *a, const float *k_tile, const float *v_tile, int64_t j0, int64_t keys,
                          int64_t first, int64_t n, const scratch *s) {
    const int64_t Dh = a->Dh;
    float *ds = s->ds + j0 * X_STEP, *p = s->p;
    for (int64_t j = 0; first > 0 && j < keys; j++) memset(ds + j * X_STEP + first - PANEL, 0, 4 * PANEL);
    for (int64_t i = first; i < n; i += PANEL) {
        multiply_rows(k_tile, s->q_across + i * Dh, Dh, p + i, X_STEP, 0, keys);
        multiply_rows(v_tile, s->dy_across + i * Dh, Dh, ds + i, X_STEP, 0, keys);
    }
    for (int64_t i = first; i < up_to(n, PANEL); i += LANES) {
        const vec seen = load(s->seen + i) - every((float)j0), lse = load(s->lse + i), along = load(s->along + i);
        for (int64_t j = 0; j < keys; j++) {
            vec probability = exp_(load(p + j * X_STEP + i) - lse);
            probability = choose(seen > every((float)j), probability, (vec){0});
            store(p + j * X_STEP + i, probability);
            store(ds + j * X_STEP + i, probability * (load(ds + j * X_STEP + i) - along));
        }
    }
    for (int64_t d = 0; d < Dh; d += PANEL) {
        const int64_t from = d * REDUCE + first * PANEL;
        multiply_rows(p + first, s->dy_along + from, n - first, s->dv + j0 * Dh + d, Dh, 1, keys);
        multiply_rows(ds + first, s->q_along + from, n - first, s->dk + j0 * Dh + d, Dh, 1, keys);
    }
}

/* dq of n queries: PANEL numbers of TILE_ROWS queries at a time, over the keys that the last of these sees. */
static void backward_queries(const attention *a, int64_t n, int64_t padded, const scratch *s) {
    const int64_t Dh = a->Dh;
    const float scale = 1 / sqrtf((float)Dh);
    float out[TILE_ROWS * PANEL];
    for (int64_t i = 0; i < n; i += TILE_ROWS) {
        const int64_t rows = smaller(TILE_ROWS, n - i), keys = (int64_t)s->seen[i + rows - 1];
        for (int64_t d = 0; d < Dh; d += PANEL) {
            multiply_columns(s->ds + i, s->k_panels + d * padded, keys, out);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t e = 0; e < PANEL; e++)
                    a->dq[s->query_at[i + row] + d + e] = out[row * PANEL + e] * scale;
        }
    }
}

/* What a piece adds to dk and dv of earlier keys: [dk or dv][key][Dh]. */
INLINE float *sums_of(const attention *a, const piece *p, int64_t kv) {
    return a->sums + (p->sums * a->Kv + kv * earlier_keys(p)) * 2 * a->Dh;
}

static void attention_backward(const attention *a, const piece *p, int64_t kv, float *start) {
    const int64_t all = keys_of(p), earlier = earlier_keys(p), padded = up_to(all, TILE_ROWS), Dh = a->Dh;
    const int64_t group = a->H / a->Kv, queries = p->length * group;
    const size_t bytes = 4 * (size_t)Dh;
    float k_tile[TILE_ROWS * X_STEP], v_tile[TILE_ROWS * X_STEP];
    scratch s;
    backward_floats(all, Dh, start, &s);
    for (int64_t j = 0; j < all; j++) s.key_at[j] = key_place(a, p, kv, j);
    pack_along(a->k, s.key_at, all, Dh, 1, padded, s.k_panels);
    memset(s.dk, 0, (size_t)padded * bytes), memset(s.dv, 0, (size_t)padded * bytes);
    for (int64_t i0 = 0; i0 < queries; i0 += REDUCE) {
        const int64_t n = smaller(REDUCE, queries - i0), seen = read_queries(a, p, kv, i0, n, &s);
        for (int64_t j0 = 0; j0 < seen; j0 += TILE_ROWS) {
            const int64_t keys = smaller(TILE_ROWS, all - j0);
            const int64_t blind = (j0 - earlier) * group - i0; /* of these queries, how many do not see key j0 */
            copy_rows(a->k, s.key_at + j0, keys, Dh, 1, k_tile);
            copy_rows(a->v, s.key_at + j0, keys, Dh, 1, v_tile);
            backward_tile(a, k_tile, v_tile, j0, keys, blind > 0 ? blind / PANEL * PANEL : 0, n, &s);
        }
        backward_queries(a, n, padded, &s);
    }
    float *sums = sums_of(a, p, kv);
    memcpy(sums, s.dk, (size_t)earlier * bytes), memcpy(sums + earlier * Dh, s.dv, (size_t)earlier * bytes);
    for (int64_t j = earlier; j < all; j++) {
        memcpy(a->dk + s.key_at[j], s.dk + j * Dh, bytes);
        memcpy(a->dv + s.key_at[j], s.dv + j * Dh, bytes);
    }
}

/* Adds them: PANEL numbers of each key, from d0 on. */
static void add_sums(const attention *a, const piece *p, int64_t kv, int64_t d0) {
    const int64_t n = earlier_keys(p);
    const float *dk = sums_of(a, p, kv) + d0, *dv = dk + n * a->Dh;
    for (int64_t j = 0; j < n; j++, dk += a->Dh, dv += a->Dh) {
        const int64_t at = key_place(a, p, kv, j) + d0;
        for (int64_t e = 0; e < PANEL; e++) a->dk[at + e] += dk[e], a->dv[at + e] += dv[e];
    }
}

/* Floats of the workspace of either. */
int64_t FOR_ISA(attention_floats)(const attention *a, int backward) {
    scratch s;
    const int64_t keys = most_keys(a);
    return a->threads * (backward ? backward_floats(keys, a->Dh, a->workspace, &s) : forward_floats(keys, a->Dh));
}

void FOR_ISA(attention)(const attention *a) {
    const int64_t floats = forward_floats(most_keys(a), a->Dh);
#pragma omp parallel for num_threads(a->threads) schedule(dynamic)
    for (int64_t task = 0; task < a->n * a->Kv; task++)
        attention_forward(a, a->pieces + task / a->Kv, task % a->Kv, a->workspace + THREAD * floats);
}

void FOR_ISA(attention_dx)(const attention *a) {
    scratch s;
    const int64_t floats = backward_floats(most_keys(a), a->Dh, a->workspace, &s);
#pragma omp parallel num_threads(a->threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < a->n * a->Kv; task++)
            attention_backward(a, a->pieces + task / a->Kv, task % a->Kv, a->workspace + THREAD * floats);
#pragma omp for collapse(2)
        for (int64_t kv = 0; kv < a->Kv; kv++)
            for (int64_t d0 = 0; d0 < a->Dh; d0 += PANEL)
                for (int64_t i = 0; i < a->n; i++) add_sums(a, a->pieces + i, kv, d0);
    }
}

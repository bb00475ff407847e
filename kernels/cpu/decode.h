/* decode.h: every layer of a decoder for one new token a row, in one call. Included by kernels.c alone.

   What models/decoder.py says in a dozen calls a layer, with nothing in between: at one row a call from Python costs as
   much as its work. R rows, D hidden size, H heads, Kv key-value heads, Dh head size, r rank. Activations are fp32; the
   residual stream x and the cache are of the model's dtype, rounded when they are written. It is the products' compute
   dtype too (product.h).

     h = RMSNorm(x);  q, k, v = h · Ŵᵀ;  rope;  k and v go into the cache;  x += (attention of q over the row) · Ŵoᵀ
     h = RMSNorm(x);  x += (silu(h · Ŵgateᵀ) ⊙ (h · Ŵupᵀ)) · Ŵdownᵀ

   A row's numbers come from that row alone, each summed by one thread in one order. */

typedef struct {
    const weight *q;
    int64_t N, K, r;
    const float *bias, *down, *up; /* (N,) or NULL; all adapters side by side: A (r, K), scaling · B (N, r) */
} projection;

enum { OF_ONE_X = 3 }; /* projections that are one call, at most: q, k, v; gate, up */

/* decode.py holds the fields of these two in the same order. */
typedef struct {
    projection q, k, v, o, gate, up, down;
    const float *input_norm, *post_norm, *q_norm, *k_norm; /* the last two (Dh,), or NULL */
    void *keys, *values;                                   /* (rows, Kv, size, Dh) */
    const int64_t *slots, *counts; /* (R,): where the new entry goes; entries 0 … counts - 1 are attended to */
    int64_t size, rope;
} decoder_layer;

typedef struct {
    int64_t R, D, H, Kv, Dh, inner, longest;
    float eps;
    int dtype, threads;
    void *x;               /* (R, D), in and out */
    const float *cos, *sin; /* (R, Dh/2) */
    float *workspace;
} decode_step;

static void norm_row(float *row, int64_t n, const float *gain, float eps) {
    float rho = 1 / sqrtf(dot(row, row, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) row[i] = row[i] * rho * gain[i];
}

/* x += added, unless that is NULL; h = RMSNorm(x) unless gain is. */
static void next_rows(const decode_step *s, const float *added, const float *gain, float *h) {
#pragma omp parallel for num_threads(s->threads) schedule(static) if (s->R * s->D > FEW)
    for (int64_t r = 0; r < s->R; r++) {
        float *row = h + r * s->D;
        read_row(s->x, s->dtype, r * s->D, s->D, row);
        if (added) {
            for (int64_t i = 0; i < s->D; i++) row[i] += added[r * s->D + i];
            write_row(row, s->D, s->x, s->dtype, r * s->D);
            read_row(s->x, s->dtype, r * s->D, s->D, row); /* rounded */
        }
        if (gain) norm_row(row, s->D, gain, s->eps);
    }
}

/* y[i] (R, N) = x (R, K) · Ŵᵀ + low-rank terms + bias, for `count` projections of one x. */
static void linear_rows(const decode_step *s, const projection *projections, int count, const float *x, float *const *y,
                        float *low, float *rest) {
    product products[OF_ONE_X];
    for (int i = 0; i < count; i++) {
        const projection *p = projections + i;
        if (p->r) FOR_ISA(narrow)(x, p->down, FP32, s->R, p->r, p->K, low, s->threads);
        products[i] = (product){.q = p->q, .M = s->R, .N = p->N, .K = p->K, .r = p->r, .x = x, .y = y[i],
                                .compute_dtype = s->dtype, .bias = p->bias, .low = low, .up = p->up, .workspace = rest,
                                .threads = s->threads};
        low += s->R * p->r;
    }
    products_of_one_x(products, count);
}

/* One head: normed if gain, turned if cos (a pair is i and i + Dh/2). */
static void turn_head(float *head, int64_t Dh, const float *gain, float eps, const float *cos, const float *sin) {
    int64_t half = Dh / 2;
    if (gain) norm_row(head, Dh, gain, eps);
    if (!cos) return;
    for (int64_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cos[i] - second * sin[i];
        head[i + half] = second * cos[i] + first * sin[i];
    }
}

/* scores[j] = scale · q · key j, for n ≤ LANES keys from element `at` on. */
INLINE void score_keys(const float *q, const void *keys, const int dtype, int64_t at, int64_t n, int64_t Dh, float scale,
                       float *scores) {
    vec sums[LANES];
    float tail[LANES] = {0};
    for (int64_t j = 0; j < LANES; j++, at += j < n ? Dh : 0) { /* beyond the last one, it again */
        sums[j] = (vec){0};
        int64_t i = 0;
        for (; i + LANES <= Dh; i += LANES) sums[j] = fma_(load(q + i), load_as(keys, dtype, at + i), sums[j]);
        for (; i < Dh; i++) tail[j] += q[i] * number_as(keys, dtype, at + i);
    }
    store(scores, (sum_each(sums) + load(tail)) * every(scale));
}

/* scores → e^(score - largest), returned is their sum. scores has room for a multiple of LANES. */
static float softmax_row(float *scores, int64_t n) {
    const vec largest = every(largest_of(scores, n));
    vec total = {0};
    for (int64_t i = n; i % LANES; i++) scores[i] = -INFINITY; /* e^-87: nothing */
    for (int64_t i = 0; i < n; i += LANES) {
        vec p = exp_(load(scores + i) - largest);
        store(scores + i, p);
        total += p;
    }
    return sum_lanes(total);
}

/* out[j] = Σ_s p[s] · values[s][j] / total, for `vecs` vectors of j at once. */
INLINE void mix(const float *p, const void *values, int dtype, int64_t at, int64_t n, int64_t Dh, float total,
                float *out, const int vecs) {
    vec sums[4];
    for (int v = 0; v < vecs; v++) sums[v] = (vec){0};
    for (int64_t s = 0; s < n; s++, at += Dh)
        for (int v = 0; v < vecs; v++) sums[v] = fma_(every(p[s]), load_as(values, dtype, at + v * LANES), sums[v]);
    for (int v = 0; v < vecs; v++) store(out + v * LANES, sums[v] / every(total));
}

/* One query over n entries, which start at element `at` of keys and values. */
INLINE void attend(const float *q, const void *keys, const void *values, int dtype, int64_t at, int64_t n, int64_t Dh,
                   float *scores, float *out) {
    float scale = 1 / sqrtf((float)Dh);
    for (int64_t s = 0; s < n; s += LANES)
        score_keys(q, keys, dtype, at + s * Dh, smaller(LANES, n - s), Dh, scale, scores + s);
    float total = softmax_row(scores, n);
    int64_t j = 0;
    for (; j + 4 * LANES <= Dh; j += 4 * LANES) mix(scores, values, dtype, at + j, n, Dh, total, out + j, 4);
    for (; j + LANES <= Dh; j += LANES) mix(scores, values, dtype, at + j, n, Dh, total, out + j, 1);
    for (; j < Dh; j++) {
        float sum = 0;
        for (int64_t s = 0; s < n; s++) sum += scores[s] * number_as(values, dtype, at + s * Dh + j);
        out[j] = sum / total;
    }
}

/* A row's key-value head and the queries that share it. */
static void attention_task(const decode_step *s, const decoder_layer *l, int64_t row, int64_t head, float *q, float *k,
                           const float *v, float *scores, float *y) {
    const int64_t Dh = s->Dh, group = s->H / s->Kv, entries = (row * s->Kv + head) * l->size * Dh;
    const float *cos = l->rope ? s->cos + row * (Dh / 2) : NULL, *sin = l->rope ? s->sin + row * (Dh / 2) : NULL;
    const int64_t slot = entries + l->slots[row] * Dh;
    turn_head(k, Dh, l->k_norm, s->eps, cos, sin);
    write_row(k, Dh, l->keys, s->dtype, slot);
    write_row(v, Dh, l->values, s->dtype, slot);
    for (int64_t j = 0; j < group; j++, q += Dh, y += Dh) {
        turn_head(q, Dh, l->q_norm, s->eps, cos, sin);
        if (s->dtype == FP32)
            attend(q, l->keys, l->values, FP32, entries, l->counts[row], Dh, scores, y);
        else
            attend(q, l->keys, l->values, BF16, entries, l->counts[row], Dh, scores, y);
    }
}

static void attention_rows(const decode_step *s, const decoder_layer *l, float *q, float *k, const float *v,
                           float *scores, int64_t score_step, float *y) {
    const int64_t Dh = s->Dh, group = s->H / s->Kv;
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t task = 0; task < s->R * s->Kv; task++) {
        int64_t own = task * group * Dh; /* (R, Kv, group, Dh): heads of a group lie side by side */
        attention_task(s, l, task / s->Kv, task % s->Kv, q + own, k + task * Dh, v + task * Dh,
                       scores + THREAD * score_step, y + own);
    }
}

INLINE int64_t score_floats(const decode_step *s) { return (s->longest + LANES - 1) / LANES * LANES + LANES; }

/* Floats of one step's workspace; a product's own comes last. */
int64_t FOR_ISA(decode_floats)(const decode_step *s, const decoder_layer *layers, int64_t n_layers) {
    int64_t heads = (s->H + 2 * s->Kv) * s->Dh, widest = heads > 2 * s->inner ? heads : 2 * s->inner;
    int64_t attended = s->H * s->Dh, rank = 0, largest = 0;
    for (const decoder_layer *l = layers; l < layers + n_layers; l++)
        for (const projection *p = &l->q; p <= &l->down; p++) {
            int64_t floats = FOR_ISA(workspace_floats)(s->R, p->N, p->K, p->r, s->threads);
            rank = p->r > rank ? p->r : rank;
            largest = floats > largest ? floats : largest;
        }
    return s->R * (2 * s->D + widest + attended + OF_ONE_X * rank) + s->threads * score_floats(s) + largest;
}

void FOR_ISA(decode)(const decode_step *s, const decoder_layer *layers, int64_t n_layers) {
    const int64_t R = s->R, Dh = s->Dh, q_width = s->H * Dh, kv_width = s->Kv * Dh;
    int64_t heads = q_width + 2 * kv_width, widest = heads > 2 * s->inner ? heads : 2 * s->inner, rank = 0;
    for (const decoder_layer *l = layers; l < layers + n_layers; l++)
        for (const projection *p = &l->q; p <= &l->down; p++) rank = p->r > rank ? p->r : rank;
    float *h = s->workspace, *added = h + R * s->D, *q = added + R * s->D, *k = q + R * q_width, *v = k + R * kv_width;
    float *gate = q, *up = gate + R * s->inner, *y = q + R * widest, *low = y + R * q_width;
    float *scores = low + OF_ONE_X * R * rank, *rest = scores + s->threads * score_floats(s);
    for (const decoder_layer *l = layers; l < layers + n_layers; l++) {
        next_rows(s, l > layers ? added : NULL, l->input_norm, h);
        linear_rows(s, &l->q, 3, h, (float *[]){q, k, v}, low, rest);
        attention_rows(s, l, q, k, v, scores, score_floats(s), y);
        linear_rows(s, &l->o, 1, y, &added, low, rest);
        next_rows(s, added, l->post_norm, h);
        linear_rows(s, &l->gate, 2, h, (float *[]){gate, up}, low, rest);
        FOR_ISA(swiglu)(gate, up, FP32, R * s->inner, gate, s->threads);
        linear_rows(s, &l->down, 1, gate, &added, low, rest);
    }
    if (n_layers) next_rows(s, added, NULL, h);
}

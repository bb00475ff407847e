/* elementwise.h: RMSNorm, SwiGLU, rope and their backwards, and the softmax of the loss, each in as few passes as it
   needs. What models/elementwise.py and kernels/vocabulary_tiles.py define. Included by kernels.c alone.

   Numbers are read SPAN at a time into fp32, worked on there, and rounded once. A row is one thread's. */

enum { SPAN = 512, FEW = 8192 }; /* fewer numbers than FEW are done before another thread has woken up */

/* = 2^n · e^t with |t| ≤ ln 2 / 2, the second by its Taylor series. */
INLINE vec exp_(vec x) {
    const vec magic = every(12582912.0f); /* 1.5 · 2^23: adding it rounds to an integer, in the lowest bits */
    x = choose(x < every(-87.0f), every(-87.0f), x);
    x = choose(x > every(88.0f), every(88.0f), x);
    vec shifted = fma_(x, every(1.44269504f), magic), n = shifted - magic;
    vec t = fma_(n, every(-0.693359375f), x);
    t = fma_(n, every(2.12194440e-4f), t);
    vec y = every(1.0f / 5040);
    y = fma_(y, t, every(1.0f / 720));
    y = fma_(y, t, every(1.0f / 120));
    y = fma_(y, t, every(1.0f / 24));
    y = fma_(y, t, every(1.0f / 6));
    y = fma_(y, t, every(0.5f));
    y = fma_(y, t, every(1.0f));
    y = fma_(y, t, every(1.0f));
    ivec power = ((ivec)shifted - (ivec)magic + 127) << 23;
    return y * (vec)power;
}

/* The next n ≤ SPAN numbers of a row, and zeros up to a whole vector. */
INLINE int64_t next_span(const void *row, int dtype, int64_t at, int64_t n, float *out) {
    n = smaller(SPAN, n);
    read_row(row, dtype, at, n, out);
    for (int64_t i = n; i % LANES; i++) out[i] = 0;
    return n;
}

/* y = x · ρ ⊙ g, ρ = 1 / √(mean(x²) + ε). x and y (rows, D) of a dtype, g and rho fp32 (D,), (rows,). */
void FOR_ISA(rms_norm)(const void *x, int dtype, const float *g, float eps, int64_t rows, int64_t D, void *y, float *rho,
                       int threads) {
#pragma omp parallel for if (rows * D > FEW) num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float a[SPAN];
        double squares = 0;
        for (int64_t j = 0, n; j < D; j += n) {
            n = next_span(x, dtype, row * D + j, D - j, a);
            vec sum = {0};
            for (int64_t i = 0; i < n; i += LANES) sum = fma_(load(a + i), load(a + i), sum);
            squares += sum_lanes(sum);
        }
        float r = rho[row] = (float)(1 / sqrt(squares / (double)D + eps));
        for (int64_t j = 0, n; j < D; j += n) {
            n = next_span(x, dtype, row * D + j, D - j, a);
            for (int64_t i = 0; i < n; i++) a[i] = a[i] * r * g[j + i];
            write_row(a, n, y, dtype, row * D + j);
        }
    }
}

/* dx = ρ · (u - x̂ · mean(u ⊙ x̂)), x̂ = x · ρ, u = dy ⊙ g. */
void FOR_ISA(rms_norm_dx)(const void *dy, const void *x, int dtype, const float *g, const float *rho, int64_t rows,
                          int64_t D, void *dx, int threads) {
#pragma omp parallel for if (rows * D > FEW) num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float a[SPAN], u[SPAN], r = rho[row];
        double along = 0;
        for (int64_t j = 0, n; j < D; j += n) {
            n = next_span(x, dtype, row * D + j, D - j, a);
            next_span(dy, dtype, row * D + j, D - j, u);
            for (int64_t i = 0; i < n; i++) u[i] *= g[j + i];
            vec sum = {0};
            for (int64_t i = 0; i < n; i += LANES) sum = fma_(load(u + i), load(a + i) * every(r), sum);
            along += sum_lanes(sum);
        }
        float mean = (float)(along / (double)D);
        for (int64_t j = 0, n; j < D; j += n) {
            n = next_span(x, dtype, row * D + j, D - j, a);
            next_span(dy, dtype, row * D + j, D - j, u);
            for (int64_t i = 0; i < n; i++) u[i] = r * (u[i] * g[j + i] - a[i] * r * mean);
            write_row(u, n, dx, dtype, row * D + j);
        }
    }
}

/* y = silu(a) ⊙ b, n numbers of a dtype each. */
void FOR_ISA(swiglu)(const void *a, const void *b, int dtype, int64_t n, void *y, int threads) {
#pragma omp parallel for if (n > FEW) num_threads(threads) schedule(static)
    for (int64_t at = 0; at < n; at += SPAN) {
        float gate[SPAN], up[SPAN];
        int64_t here = next_span(a, dtype, at, n - at, gate);
        next_span(b, dtype, at, n - at, up);
        for (int64_t i = 0; i < here; i += LANES) {
            vec x = load(gate + i);
            store(gate + i, x / (exp_(-x) + every(1.0f)) * load(up + i));
        }
        write_row(gate, here, y, dtype, at);
    }
}

/* db = dy ⊙ silu(a), da = dy ⊙ b ⊙ σ(a) · (1 + a · (1 - σ(a))). */
void FOR_ISA(swiglu_dx)(const void *dy, const void *a, const void *b, int dtype, int64_t n, void *da, void *db,
                        int threads) {
#pragma omp parallel for if (n > FEW) num_threads(threads) schedule(static)
    for (int64_t at = 0; at < n; at += SPAN) {
        float d[SPAN], gate[SPAN], up[SPAN];
        int64_t here = next_span(a, dtype, at, n - at, gate);
        next_span(b, dtype, at, n - at, up);
        next_span(dy, dtype, at, n - at, d);
        for (int64_t i = 0; i < here; i += LANES) {
            vec x = load(gate + i), s = every(1.0f) / (exp_(-x) + every(1.0f)), slope = load(d + i);
            vec d_silu = s * fma_(x, every(1.0f) - s, every(1.0f));
            store(gate + i, slope * load(up + i) * d_silu);
            store(up + i, slope * (x * s));
        }
        write_row(gate, here, da, dtype, at);
        write_row(up, here, db, dtype, at);
    }
}

/* Where the heads of x (B, T, H, Dh) lie: elements from one to the next of each kind. The last dimension is dense. */
typedef struct {
    int64_t B, T, H, Dh, batch, token, head;
} heads;

/* y = R(θ) x, dense; each pair (i, i + Dh/2) turned by its angle, backwards if sign is -1. cos and sin fp32 (T, Dh/2),
   and `per_row` further on for each row of the batch. */
void FOR_ISA(rope)(const void *x, int dtype, const heads *s, const float *cos, const float *sin, int64_t per_row,
                   float sign, void *y, int threads) {
    const int64_t half = s->Dh / 2, tokens = s->B * s->T;
#pragma omp parallel for if (tokens * s->H * s->Dh > FEW) num_threads(threads) schedule(static)
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t b = token / s->T, t = token % s->T;
        const float *c = cos + b * per_row + t * half, *d = sin + b * per_row + t * half;
        for (int64_t h = 0; h < s->H; h++) {
            const int64_t from = b * s->batch + t * s->token + h * s->head, to = (token * s->H + h) * s->Dh;
            for (int64_t j = 0, n; j < half; j += n) {
                float first[SPAN], second[SPAN];
                n = smaller(SPAN, half - j);
                read_row(x, dtype, from + j, n, first);
                read_row(x, dtype, from + half + j, n, second);
                for (int64_t i = 0; i < n; i++) {
                    float p = first[i], q = second[i], turn = sign * d[j + i];
                    first[i] = p * c[j + i] - q * turn;
                    second[i] = q * c[j + i] + p * turn;
                }
                write_row(first, n, y, dtype, to + j);
                write_row(second, n, y, dtype, to + half + j);
            }
        }
    }
}

INLINE float largest_of(const float *p, int64_t n) {
    vec most = every(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) most = choose(load(p + i) > most, load(p + i), most);
    float largest = -INFINITY;
    for (int j = 0; j < LANES; j++) largest = most[j] > largest ? most[j] : largest;
    for (; i < n; i++) largest = p[i] > largest ? p[i] : largest;
    return largest;
}

/* kernels/vocabulary_tiles.py: RunningSoftmax.take for z (rows, n) fp32, words first … first + n. scale is 1 / τ; m and
   at_target are before it. mixed and slope (rows, D) may be NULL. */
void FOR_ISA(running_softmax)(float *z, int64_t rows, int64_t n, float scale, const int64_t *targets, int64_t first,
                              float *m, float *at_target, double *total, double *mixed, float *slope, int64_t D,
                              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float *p = z + row * n, most = largest_of(p, n), a[SPAN];
        int64_t at = targets[row] - first;
        if (at >= 0 && at < n) at_target[row] = p[at];
        if (m[row] > most) most = m[row];
        if (m[row] != most && total[row] > 0) {
            double change = ((double)m[row] - most) * scale, c = exp(change);
            if (mixed) mixed[row] = c * (mixed[row] + change * total[row]);
            total[row] *= c;
            for (int64_t j = 0; slope && j < D; j++) slope[row * D + j] *= (float)c;
        }
        m[row] = most;
        for (int64_t j = 0, here; j < n; j += here) {
            here = next_span(p, FP32, j, n - j, a);
            for (int64_t i = here; i % LANES; i++) a[i] = -INFINITY; /* beyond the row: e^-87, nothing */
            vec sum = {0}, weighted = {0};
            for (int64_t i = 0; i < here; i += LANES) {
                vec shifted = (load(a + i) - every(most)) * every(scale), power = exp_(shifted);
                store(a + i, power);
                sum += power;
                if (mixed) weighted = fma_(choose(shifted < every(-87.0f), every(-87.0f), shifted), power, weighted);
            }
            total[row] += sum_lanes(sum);
            if (mixed) mixed[row] += sum_lanes(weighted);
            write_row(a, here, p, FP32, j);
        }
    }
}

/* p = softmax(z · scale) of each row of z (rows, V) fp32: `blocks` gets Σ p over every `block` ≤ SPAN neighbours, largest
   and total what log p = (z - largest) · scale - total is made of. p itself is never written. */
void FOR_ISA(softmax_blocks)(const float *z, int64_t rows, int64_t V, float scale, int64_t block, float *largest,
                             float *total, float *blocks, int threads) {
    const int64_t n_blocks = (V + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float *p = z + row * V;
        float a[SPAN], most = largest_of(p, V), *sums = blocks + row * n_blocks;
        double all = 0;
        for (int64_t b = 0; b < n_blocks; b++) {
            int64_t n = next_span(p, FP32, b * block, smaller(block, V - b * block), a);
            for (int64_t i = n; i % LANES; i++) a[i] = -INFINITY; /* e^-87: nothing */
            vec sum = {0};
            for (int64_t i = 0; i < n; i += LANES) sum += exp_((load(a + i) - every(most)) * every(scale));
            all += sums[b] = sum_lanes(sum);
        }
        largest[row] = most;
        total[row] = (float)log(all);
        for (int64_t b = 0; b < n_blocks; b++) sums[b] *= (float)(1 / all);
    }
}

/* adamw.h: one AdamW step in one pass over its arrays. What kernels/adamw.py defines; the numbers of the step come from
   there. Included by kernels.c alone. */

/* decay 1 - lr·λ, take1 1-β₁, keep2 β₂, take2 1-β₂, scale2 1/√(1-β₂^t), rate -lr/(1-β₁^t). */
typedef struct {
    float decay, take1, keep2, take2, scale2, eps, rate;
} adamw_step;

/* ALONE: up to so many elements one thread is done before another has woken up. Of more, a thread takes half as many at
   a time: one that also has a page to move (optim/pages.py) takes fewer of them, and none waits for it. */
enum { STATE_BLOCK = 256, ALONE = 32768 };

INLINE void adamw_lanes(vec *p, vec g, vec *m, vec *v, const adamw_step *s) {
    *p *= every(s->decay);
    *m = fma_(every(s->take1), g - *m, *m);
    *v = fma_(every(s->take2) * g, g, *v * every(s->keep2));
    *p += every(s->rate) * *m / (root(*v) * every(s->scale2) + every(s->eps));
}

/* n elements as fp32, the last lanes in a copy, so that an element's result does not depend on where it lies. */
INLINE void adamw_span(float *p, const float *g, float *m, float *v, int64_t n, const adamw_step *s) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec pi = load(p + i), mi = load(m + i), vi = load(v + i);
        adamw_lanes(&pi, load(g + i), &mi, &vi, s);
        store(p + i, pi), store(m + i, mi), store(v + i, vi);
    }
    if (i < n) {
        size_t bytes = 4 * (size_t)(n - i);
        vec pi = {0}, gi = {0}, mi = {0}, vi = {0};
        memcpy(&pi, p + i, bytes), memcpy(&gi, g + i, bytes), memcpy(&mi, m + i, bytes), memcpy(&vi, v + i, bytes);
        adamw_lanes(&pi, gi, &mi, &vi, s);
        memcpy(p + i, &pi, bytes), memcpy(m + i, &mi, bytes), memcpy(v + i, &vi, bytes);
    }
}

/* p and g (n,) of a dtype each; m and v fp32 (n,). */
void FOR_ISA(adamw)(void *p, int p_dtype, const void *g, int g_dtype, float *m, float *v, int64_t n,
                    const adamw_step *s, int threads) {
#pragma omp parallel for if (n > ALONE) num_threads(threads) schedule(dynamic, ALONE / 2 / CHUNK)
    for (int64_t first = 0; first < n; first += CHUNK) {
        int64_t length = n - first < CHUNK ? n - first : CHUNK;
        if (p_dtype == FP32 && g_dtype == FP32) {
            adamw_span((float *)p + first, (const float *)g + first, m + first, v + first, length, s);
            continue;
        }
        float values[CHUNK], gradient[CHUNK];
        read_row(p, p_dtype, first, length, values);
        read_row(g, g_dtype, first, length, gradient);
        adamw_span(values, gradient, m + first, v + first, length, s);
        write_row(values, length, p, p_dtype, first);
    }
}

INLINE void read_state(const uint8_t *codes, float absmax, const map_8bit *map, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = map->level[codes[i]] * absmax;
}

/* Returns the block's absmax; 0 where its inverse is not finite. */
INLINE float write_state(const float *x, const map_8bit *map, int64_t n, uint8_t *codes) {
    float most = 0;
    for (int64_t i = 0; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    float inverse = 1 / most;
    if (!isfinite(inverse)) most = inverse = 0;
    for (int64_t i = 0; i < n; i++) codes[i] = nearest_8bit(x[i] * inverse, map);
    return most;
}

/* codes (n,) and absmax (⌈n/256⌉,) of both moments; map1 is signed, map2 is not. */
void FOR_ISA(adamw_8bit)(void *p, int p_dtype, const void *g, int g_dtype, uint8_t *codes1, float *absmax1,
                         uint8_t *codes2, float *absmax2, const map_8bit *map1, const map_8bit *map2, int64_t n,
                         const adamw_step *s, int threads) {
#pragma omp parallel for if (n > ALONE) num_threads(threads) schedule(dynamic, ALONE / 2 / STATE_BLOCK)
    for (int64_t block = 0; block < (n + STATE_BLOCK - 1) / STATE_BLOCK; block++) {
        int64_t first = block * STATE_BLOCK, length = n - first < STATE_BLOCK ? n - first : STATE_BLOCK;
        float values[STATE_BLOCK], gradient[STATE_BLOCK], m[STATE_BLOCK], v[STATE_BLOCK];
        read_row(p, p_dtype, first, length, values);
        read_row(g, g_dtype, first, length, gradient);
        read_state(codes1 + first, absmax1[block], map1, length, m);
        read_state(codes2 + first, absmax2[block], map2, length, v);
        adamw_span(values, gradient, m, v, length, s);
        write_row(values, length, p, p_dtype, first);
        absmax1[block] = write_state(m, map1, length, codes1 + first);
        absmax2[block] = write_state(v, map2, length, codes2 + first);
    }
}

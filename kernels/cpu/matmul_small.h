/* matmul_small.h: forward for 1 to 8 rows, as in decoding. Included by kernels.c alone.

   Here decoding the weight is the larger part of the work, so nothing decoded is stored: 32 weights go from bytes into
   registers and are multiplied with every row at once. With one row the block's scale multiplies the block's sum and
   not each weight. */

enum { SMALL = 8, SMALL_OUT = 32, L1_FLOATS = 4096, AHEAD = 1024 };

/* Columns taken at a time, so that all rows of x stay in the L1 cache. */
INLINE int64_t columns_of(int64_t M) { return L1_FLOATS / M / 32 * 32; }

/* Scales of blocks first … first + n - 1. The fields are copied: the compiler cannot know that `scales` overlaps none. */
INLINE void scales_of(const weight *q, int64_t first, int64_t n, float *scales) {
    if (q->absmax) {
        memcpy(scales, q->absmax + first, 4 * (size_t)n);
        return;
    }
    const uint8_t *index = q->absmax_8bit;
    const float *code = q->absmax_code, offset = *q->absmax_offset;
    for (int64_t block = first, stop = first + n; block < stop;) {
        float scale2 = q->absmax2[block >> q->shift2];
        int64_t end = smaller(stop, ((block >> q->shift2) + 1) << q->shift2);
        for (; block < end; block++) scales[block - first] = code[index[block]] * scale2 + offset;
    }
}

/* sums[m] += Σ_k Ŵ[first + k] · x[m][k] over k < 32 · groups. x is [group][m][32], in the order of
   decode32_mixed; first is a multiple of 32. The bytes `ahead` are fetched meanwhile: pieces of rows are too short for
   the processor to notice where they lead. */
INLINE void dot_row(const weight *q, const codebook *code, int64_t first, const float *x, int64_t groups,
                    int64_t ahead, float *sums, const int M) {
    enum { VECS = 32 / LANES };
    const int64_t per_block = q->shift - 5, start = first >> 5, first_block = first >> q->shift;
    float scales[L1_FLOATS / 32];
    vec acc[SMALL][2];
    scales_of(q, first_block, ((first + 32 * groups - 1) >> q->shift) + 1 - first_block, scales);
    for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = (vec){0};
    const uint8_t *packed = q->packed + (first >> 1);
    for (int64_t group = 0; group < groups; group++, packed += 16, x += 32 * M) {
        vec levels[VECS], scale = every(scales[((start + group) >> per_block) - first_block]);
        __builtin_prefetch(packed + ahead);
        decode32_mixed(packed, code, levels);
        if (M == 1) {
            vec part = levels[0] * load(x);
            for (int j = 1; j < VECS; j++) part = fma_(levels[j], load(x + j * LANES), part);
            acc[0][0] = fma_(part, scale, acc[0][0]);
            continue;
        }
        for (int j = 0; j < VECS; j++) levels[j] *= scale;
        for (int m = 0; m < M; m++)
            for (int j = 0; j < VECS; j++) {
                int one = M <= 4 ? j % 2 : 0; /* two chains of additions, while there are registers for them */
                acc[m][one] = fma_(levels[j], load(x + m * 32 + j * LANES), acc[m][one]);
            }
    }
    for (int m = 0; m < M; m++) sums[m] += sum_lanes(M <= 4 ? acc[m][0] + acc[m][1] : acc[m][0]);
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums = fma_(load(a + i), load(b + i), sums);
    float sum = sum_lanes(sums);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

INLINE void few_rows_tile(const product *p, const codebook *code, const float *x, int64_t n0, const int M) {
    float sums[SMALL_OUT][SMALL] = {{0}}, line[SMALL_OUT];
    int64_t outputs = smaller(SMALL_OUT, p->N - n0), columns = columns_of(M);
    int64_t ahead = columns < p->K ? columns / 2 : AHEAD;
    for (int64_t k = 0; k < p->K; k += columns)
        for (int64_t n = 0; n < outputs; n++)
            dot_row(p->q, code, (n0 + n) * p->K + k, x + k * M, smaller(columns, p->K - k) / 32, ahead, sums[n], M);
    for (int m = 0; m < M; m++) {
        for (int64_t n = 0; n < outputs; n++) {
            line[n] = sums[n][m];
            line[n] += dot(p->low + m * p->r, p->up + (n0 + n) * p->r, p->r);
            if (p->bias) line[n] += p->bias[n0 + n];
        }
        write_row(line, outputs, p->y, p->dtype, m * p->N + n0);
    }
}

static void few_rows_tile_of(const product *p, const codebook *code, const float *x, int64_t n0) {
    switch (p->M) { /* the count of rows as a constant, so that its loops unroll into registers */
        case 1: few_rows_tile(p, code, x, n0, 1); break;
        case 2: few_rows_tile(p, code, x, n0, 2); break;
        case 3: few_rows_tile(p, code, x, n0, 3); break;
        case 4: few_rows_tile(p, code, x, n0, 4); break;
        case 5: few_rows_tile(p, code, x, n0, 5); break;
        case 6: few_rows_tile(p, code, x, n0, 6); break;
        case 7: few_rows_tile(p, code, x, n0, 7); break;
        default: few_rows_tile(p, code, x, n0, 8); break;
    }
}

static void few_rows(const product *p) {
    for (int64_t k = 0; k < p->K; k += 32)
        for (int64_t m = 0; m < p->M; m++) {
            float row[32], *mixed = p->workspace + (k * p->M + m * 32);
            read_row(p->x, p->dtype, m * p->K + k, 32, row);
            for (int j = 0; j < 32; j++) mixed[j] = row[MIXED(j)];
        }
    const codebook code = load_codebook(p->q->code);
#pragma omp parallel for num_threads(p->threads) schedule(static)
    for (int64_t n0 = 0; n0 < p->N; n0 += SMALL_OUT) few_rows_tile_of(p, &code, p->workspace, n0);
}

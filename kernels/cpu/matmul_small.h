/* matmul_small.h: forward for 1 to 8 rows, as in decoding, where K is a multiple of 64. Included by kernels.c alone.

   Here decoding the weight is the larger part of the work, so nothing decoded is stored: 64 weights go from bytes into
   registers and are multiplied with every row at once. A scale multiplies its block's sums and not each weight. A row's
   result is the same to the bit with any other rows beside it. */

enum { SMALL = 8, SMALL_OUT = 32, SMALL_GROUP = 64, L1_FLOATS = 4096, AHEAD = 2048 };

/* Columns taken at a time, so that all rows of x stay in the L1 cache. */
INLINE int64_t columns_of(int64_t M) { return L1_FLOATS / M / SMALL_GROUP * SMALL_GROUP; }

/* Under double quantization, all scales that blocks with one absmax2 can have: 256 of them for 256 blocks, so that a
   block's scale is one load. */
typedef struct {
    int64_t block2;
    float scale[256];
} scale_table;

INLINE void fill_table(const weight *q, int64_t block2, scale_table *table) {
    if (table->block2 == block2) return;
    const vec absmax2 = every(q->absmax2[block2]), offset = every(*q->absmax_offset);
    for (int i = 0; i < 256; i += LANES) store(table->scale + i, load(q->absmax_code + i) * absmax2 + offset);
    table->block2 = block2;
}

/* acc[m] += Σ_k Ŵ[first + k] · x[m][k] over k < 64 · groups, in lanes. x is [group][m][64], in decode64_mixed's order;
   first is a multiple of 64. A block's scale is scale[index[block]], or scale[block] where index is NULL. The bytes
   `ahead` are fetched meanwhile: pieces of rows are too short for the processor to notice where they lead. */
INLINE void dot_groups(const weight *q, const codebook *code, int64_t first, const uint8_t *index, const float *scale,
                       const float *x, int64_t groups, int64_t ahead, vec *acc, const int M) {
    enum { VECS = SMALL_GROUP / LANES, PART = VECS / SCALES_OF_64, HALF = PART / 2 };
    const int64_t shift = q->shift - 5;
    const uint8_t *packed = q->packed + first / 2;
    int64_t run = first >> 5; /* of 32 weights, which one block has */
    for (int64_t group = 0; group < groups; group++, packed += SMALL_GROUP / 2, x += SMALL_GROUP * M, run += 2) {
        vec levels[VECS], scales[SCALES_OF_64];
        __builtin_prefetch(packed + ahead);
        int64_t block = run >> shift;
        float here = index ? scale[index[block]] : scale[block];
        if (shift) {
            for (int i = 0; i < SCALES_OF_64; i++) scales[i] = every(here);
        } else {
            float next = index ? scale[index[block + 1]] : scale[block + 1];
            for (int i = 0; i < SCALES_OF_64; i++) scales[i] = two_scales(here, next, i);
        }
        decode64_mixed(packed, code, levels);
        for (int m = 0; m < M; m++)
            for (int i = 0; i < SCALES_OF_64; i++) {
                const float *row = x + m * SMALL_GROUP + i * PART * LANES;
                const vec *level = levels + i * PART;
                vec one = level[0] * load(row), other = level[HALF] * load(row + HALF * LANES); /* two short chains */
                for (int j = 1; j < HALF; j++) {
                    one = fma_(level[j], load(row + j * LANES), one);
                    other = fma_(level[HALF + j], load(row + (HALF + j) * LANES), other);
                }
                acc[m] = fma_(one + other, scales[i], acc[m]);
            }
    }
}

/* The same for n weights of one row, whose blocks may have several absmax2. */
INLINE void dot_row(const weight *q, const codebook *code, int64_t first, const float *x, int64_t n, int64_t ahead,
                    scale_table *table, vec *sums, const int M) {
    vec acc[SMALL];
    for (int m = 0; m < M; m++) acc[m] = sums[m];
    if (q->absmax) {
        dot_groups(q, code, first, NULL, q->absmax, x, n / SMALL_GROUP, ahead, acc, M);
    } else {
        const int64_t shift = q->shift + q->shift2;
        for (int64_t i = first, stop = first + n, end; i < stop; i = end) {
            end = smaller(stop, ((i >> shift) + 1) << shift);
            fill_table(q, i >> shift, table);
            dot_groups(q, code, i, q->absmax_8bit, table->scale, x + (i - first) * M, (end - i) / SMALL_GROUP, ahead,
                       acc, M);
        }
    }
    for (int m = 0; m < M; m++) sums[m] = acc[m];
}

/* Lane i of what is returned: the sum over sums[i]. Each round sets two sums side by side, half as long. */
INLINE vec sum_each(vec *sums) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            sums[i] = SHUFFLE(sums[i], sums[i + half], LOWER) + SHUFFLE(sums[i], sums[i + half], UPPER);
    return sums[0];
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums = fma_(load(a + i), load(b + i), sums);
    float sum = sum_lanes(sums);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* sums += low[m] · up[n], in lanes; what is no whole vector goes into lane 0. */
INLINE void add_low_rank(const product *p, int64_t m, int64_t n, vec *sums) {
    const float *low = p->low + m * p->r, *up = p->up + n * p->r;
    int64_t i = 0;
    for (; i + LANES <= p->r; i += LANES) *sums = fma_(load(low + i), load(up + i), *sums);
    for (; i < p->r; i++) (*sums)[0] += low[i] * up[i];
}

INLINE void few_rows_tile(const product *p, const codebook *code, const float *x, int64_t n0, const int M) {
    vec sums[SMALL_OUT][SMALL];
    float line[SMALL_OUT];
    scale_table table;
    table.block2 = -1;
    int64_t outputs = smaller(SMALL_OUT, p->N - n0), columns = columns_of(M);
    for (int64_t n = 0; n < outputs; n++)
        for (int m = 0; m < M; m++) sums[n][m] = (vec){0};
    for (int64_t k = 0; k < p->K; k += columns) {
        int64_t next = k + columns < p->K ? columns : SMALL_OUT * p->K - k; /* these rows' next piece, or other rows */
        int64_t ahead = columns < p->K ? next / 2 : AHEAD;
        for (int64_t n = 0; n < outputs; n++)
            dot_row(p->q, code, (n0 + n) * p->K + k, x + k * M, smaller(columns, p->K - k), ahead, &table, sums[n], M);
    }
    for (int64_t n = outputs; n < SMALL_OUT; n++)
        for (int m = 0; m < M; m++) sums[n][m] = (vec){0};
    for (int m = 0; m < M; m++) {
        for (int64_t n = 0; n < outputs; n++) add_low_rank(p, m, n0 + n, &sums[n][m]);
        for (int n = 0; n < SMALL_OUT; n += LANES) {
            vec part[LANES];
            for (int i = 0; i < LANES; i++) part[i] = sums[n + i][m];
            store(line + n, sum_each(part));
        }
        for (int64_t n = 0; n < outputs && p->bias; n++) line[n] += p->bias[n0 + n];
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
#pragma omp parallel for num_threads(p->threads) schedule(static) if (p->M * p->K > FEW)
    for (int64_t k = 0; k < p->K; k += SMALL_GROUP)
        for (int64_t m = 0; m < p->M; m++) {
            float row[SMALL_GROUP], *mixed = p->workspace + (k * p->M + m * SMALL_GROUP);
            read_row(p->x, p->dtype, m * p->K + k, SMALL_GROUP, row);
            for (int j = 0; j < SMALL_GROUP; j++) mixed[j] = row[MIXED(j)];
        }
    const codebook code = load_codebook(p->q->code);
    const int64_t tasks = (p->N + SMALL_OUT - 1) / SMALL_OUT;
/* Long runs of tasks, since each fetches ahead for the one behind it, then shorter ones as the threads get to them. */
#pragma omp parallel for num_threads(p->threads) schedule(guided, 4)
    for (int64_t task = 0; task < tasks; task++) few_rows_tile_of(p, &code, p->workspace, task * SMALL_OUT);
}

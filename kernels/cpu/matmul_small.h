/* matmul_small.h: forward for 1 to 8 rows, as in decoding, where K is a multiple of 64. Included by kernels.c alone.

   Here decoding the weight is the larger part of the work, so nothing decoded is stored: 64 weights go from bytes into
   registers and are multiplied with every row at once. Where the table of levels is one register (AVX-512) a scale
   multiplies the table, 16 levels for 64 weights; elsewhere its block's sums, and not each weight. In pairs the table is of
   scaled levels rounded to bf16. A row's result is the same to the bit with any other rows beside it. */

enum {
    SMALL = 8,
    SMALL_OUT = 32,
    SMALL_ROWS = LANES == 16 ? 2 : 1, /* of the weight, which share each load of x: loads are as scarce as products */
    SMALL_GROUP = 64,
    L1_FLOATS = 4608, /* 8 rows of 576 */
    AHEAD = 2048
};

/* Columns taken at a time, so that all rows of x stay in the L1 cache: even pieces of K. */
INLINE int64_t columns_of(int64_t M, int64_t K, const int pairs) {
    int64_t groups = K / SMALL_GROUP, pieces = (words_of(K * M, pairs) + L1_FLOATS - 1) / L1_FLOATS;
    return (groups + pieces - 1) / pieces * SMALL_GROUP;
}

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

/* acc[r][m] += Σ_k Ŵ[r][k] · x[m][k], in lanes, over 64 weights of `rows` rows of Ŵ, row r's at packed + r · step. here[r] is
   the scale of its first 32, next[r] of the others. x is [m][64], in decode64_mixed's order; of pairs, in
   decode64_pairs'. */
#if PAIRS
INLINE void add_group_pairs(const uint8_t *packed, int64_t step, const codebook *code, const float *here,
                            const float *next, int one_scale, const float *x, vec (*acc)[SMALL], const int M,
                            const int rows) {
    enum { VECS = SMALL_GROUP / 2 / LANES };
    vec levels[SMALL_ROWS][VECS];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
        decode64_pairs(packed + r * step, code, here[r], one_scale ? 0 : next[r], one_scale, levels[r]);
#pragma GCC unroll 2
    for (int j = 0; j < VECS; j++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const vec x_j = once(load(x + m * SMALL_GROUP / 2 + j * LANES));
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) acc[r][m] = dot_pairs(levels[r][j], x_j, acc[r][m]);
        }
}
#else
#define MIXED_PAIRS MIXED
#define add_group_pairs add_group
#endif

#if LANES == 16
INLINE void add_group(const uint8_t *packed, int64_t step, const codebook *code, const float *here, const float *next,
                      int one_scale, const float *x, vec (*acc)[SMALL], const int M, const int rows) {
    vec levels[SMALL_ROWS][4];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
        if (one_scale) {
            const codebook scaled = times(code, here[r]);
            decode64_mixed(packed + r * step, &scaled, levels[r]);
        } else {
            decode64_mixed(packed + r * step, code, levels[r]);
            for (int j = 0; j < 4; j++) levels[r][j] *= two_scales(here[r], next[r], 0);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const vec x_j = once(load(x + m * SMALL_GROUP + j * LANES));
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) acc[r][m] = fma_(levels[r][j], x_j, acc[r][m]);
        }
}
#else
INLINE void add_group(const uint8_t *packed, int64_t step, const codebook *code, const float *here, const float *next,
                      int one_scale, const float *x, vec (*acc)[SMALL], const int M, const int rows) {
    enum { VECS = SMALL_GROUP / LANES, PART = VECS / SCALES_OF_64, HALF = PART / 2 };
    for (int r = 0; r < rows; r++) {
        vec levels[VECS], scales[SCALES_OF_64];
        for (int i = 0; i < SCALES_OF_64; i++) scales[i] = one_scale ? every(here[r]) : two_scales(here[r], next[r], i);
        decode64_mixed(packed + r * step, code, levels);
        for (int m = 0; m < M; m++)
            for (int i = 0; i < SCALES_OF_64; i++) {
                const float *row = x + m * SMALL_GROUP + i * PART * LANES;
                const vec *level = levels + i * PART;
                vec one = level[0] * load(row), other = level[HALF] * load(row + HALF * LANES); /* two short chains */
                for (int j = 1; j < HALF; j++) {
                    one = fma_(level[j], load(row + j * LANES), one);
                    other = fma_(level[HALF + j], load(row + (HALF + j) * LANES), other);
                }
                acc[r][m] = fma_(one + other, scales[i], acc[r][m]);
            }
    }
}
#endif

/* The same for 64 · groups weights of each row; first is a multiple of 64. Under double quantization `table` has the scales
   of these blocks. The bytes `ahead` are fetched meanwhile: pieces of rows are too short for the processor to notice
   where they lead. */
INLINE void dot_groups(const weight *q, const codebook *code, int64_t first, int64_t K, const scale_table *table,
                       const float *x, int64_t groups, int64_t ahead, vec (*sums)[SMALL], const int M, const int rows,
                       const int double_quant, const int pairs) {
    const int64_t shift = q->shift, step = K >> 1;
    const uint8_t *packed = q->packed + (first >> 1);
    vec acc[SMALL_ROWS][SMALL];
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < M; m++) acc[r][m] = sums[r][m];
#pragma GCC unroll 2
    for (int64_t group = 0; group < groups; group++, first += SMALL_GROUP, packed += SMALL_GROUP / 2) {
        float here[SMALL_ROWS], next[SMALL_ROWS];
        for (int r = 0; r < rows; r++) {
            const int64_t block = (first + r * K) >> shift;
            __builtin_prefetch(packed + r * step + ahead);
            here[r] = double_quant ? table->scale[q->absmax_8bit[block]] : q->absmax[block];
            if (shift == 5) next[r] = double_quant ? table->scale[q->absmax_8bit[block + 1]] : q->absmax[block + 1];
        }
        if (pairs)
            add_group_pairs(packed, step, code, here, next, shift > 5, x, acc, M, rows);
        else
            add_group(packed, step, code, here, next, shift > 5, x, acc, M, rows);
        x += words_of(SMALL_GROUP * M, pairs);
    }
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < M; m++) sums[r][m] = acc[r][m];
}

/* The same for n weights of one row, whose blocks may have several absmax2. */
INLINE void dot_row(const weight *q, const codebook *code, int64_t first, const float *x, int64_t n, int64_t ahead,
                    scale_table *table, vec (*sums)[SMALL], const int M, const int pairs) {
    const int64_t shift = q->shift + q->shift2;
    for (int64_t i = first, stop = first + n, end; i < stop; i = end) {
        end = smaller(stop, ((i >> shift) + 1) << shift);
        fill_table(q, i >> shift, table);
        dot_groups(q, code, i, 0, table, x + words_of((i - first) * M, pairs), (end - i) / SMALL_GROUP, ahead, sums, M, 1,
                   1, pairs);
    }
}

/* The same for n weights of each of `rows` rows: together where all their blocks have one absmax2, or there is none. */
INLINE void dot_rows(const weight *q, const codebook *code, int64_t first, int64_t K, const float *x, int64_t n,
                     int64_t ahead, scale_table *table, vec (*sums)[SMALL], const int M, const int rows,
                     const int pairs) {
    const int64_t shift = q->shift + q->shift2, last = first + (rows - 1) * K + n - 1;
    if (q->absmax) {
        dot_groups(q, code, first, K, table, x, n / SMALL_GROUP, ahead, sums, M, rows, 0, pairs);
    } else if (first >> shift == last >> shift) {
        fill_table(q, first >> shift, table);
        dot_groups(q, code, first, K, table, x, n / SMALL_GROUP, ahead, sums, M, rows, 1, pairs);
    } else {
        for (int r = 0; r < rows; r++) dot_row(q, code, first + r * K, x, n, ahead, table, sums + r, M, pairs);
    }
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

/* Σ_k a[at + k] · b[from + k] */
INLINE float dot_as(const void *a, int64_t at, const void *b, int64_t from, int dtype, int64_t n) {
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums = fma_(load_as(a, dtype, at + i), load_as(b, dtype, from + i), sums);
    float sum = sum_lanes(sums);
    for (; i < n; i++) sum += number_as(a, dtype, at + i) * number_as(b, dtype, from + i);
    return sum;
}

INLINE float dot(const float *a, const float *b, int64_t n) { return dot_as(a, 0, b, 0, FP32, n); }

/* sums += low[m] · up[n], in lanes; what is no whole vector goes into lane 0. */
INLINE void add_low_rank(const product *p, int64_t m, int64_t n, vec *sums) {
    const float *low = p->low + m * p->r, *up = p->up + n * p->r;
    int64_t i = 0;
    for (; i + LANES <= p->r; i += LANES) *sums = fma_(load(low + i), load(up + i), *sums);
    for (; i < p->r; i++) (*sums)[0] += low[i] * up[i];
}

INLINE void few_rows_tile(const product *p, const codebook *code, const float *x, int64_t n0, const int M,
                          const int pairs) {
    vec sums[SMALL_OUT][SMALL];
    float line[SMALL_OUT];
    scale_table table;
    table.block2 = -1;
    int64_t outputs = smaller(SMALL_OUT, p->N - n0), columns = columns_of(M, p->K, pairs);
    for (int64_t n = 0; n < outputs; n++)
        for (int m = 0; m < M; m++) sums[n][m] = (vec){0};
    for (int64_t k = 0; k < p->K; k += columns) {
        int64_t next = k + columns < p->K ? columns : SMALL_OUT * p->K - k; /* these rows' next piece, or other rows */
        int64_t ahead = columns < p->K ? next / 2 : AHEAD;
        const int64_t here = smaller(columns, p->K - k), first = n0 * p->K + k;
        const float *x_k = x + words_of(k * M, pairs);
        int64_t n = 0;
        for (; n + SMALL_ROWS <= outputs; n += SMALL_ROWS)
            dot_rows(p->q, code, first + n * p->K, p->K, x_k, here, ahead, &table, sums + n, M, SMALL_ROWS, pairs);
        for (; n < outputs; n++)
            dot_rows(p->q, code, first + n * p->K, p->K, x_k, here, ahead, &table, sums + n, M, 1, pairs);
    }
    for (int64_t n = outputs; n < SMALL_OUT; n++)
        for (int m = 0; m < M; m++) sums[n][m] = (vec){0};
    for (int m = 0; m < M; m++) {
        for (int64_t n = 0; n < outputs && p->r; n++) add_low_rank(p, m, n0 + n, &sums[n][m]);
        for (int n = 0; n < SMALL_OUT; n += LANES) {
            vec part[LANES];
            for (int i = 0; i < LANES; i++) part[i] = sums[n + i][m];
            store(line + n, sum_each(part));
        }
        for (int64_t n = 0; n < outputs && p->bias; n++) line[n] += p->bias[n0 + n];
        write_row(line, outputs, p->y, p->y_dtype, m * p->N + n0);
    }
}

/* With the count of rows as a constant, so that its loops unroll into registers. A function for each: compilers take
   much longer over all of them in one. */
typedef void few_rows_function(const product *p, const codebook *code, const float *x, int64_t n0);
#define FEW_ROWS(M, kind, pairs)                                                                                    \
    static void few_rows_##kind##_##M(const product *p, const codebook *code, const float *x, int64_t n0) {         \
        few_rows_tile(p, code, x, n0, M, pairs);                                                                    \
    }
#define FEW_ROWS_UP_TO_8(kind, pairs)                                                                               \
    FEW_ROWS(1, kind, pairs) FEW_ROWS(2, kind, pairs) FEW_ROWS(3, kind, pairs) FEW_ROWS(4, kind, pairs)             \
    FEW_ROWS(5, kind, pairs) FEW_ROWS(6, kind, pairs) FEW_ROWS(7, kind, pairs) FEW_ROWS(8, kind, pairs)             \
    static few_rows_function *const few_rows_##kind[SMALL] = {                                                      \
        few_rows_##kind##_1, few_rows_##kind##_2, few_rows_##kind##_3, few_rows_##kind##_4,                         \
        few_rows_##kind##_5, few_rows_##kind##_6, few_rows_##kind##_7, few_rows_##kind##_8};
FEW_ROWS_UP_TO_8(fp32, 0)
#if PAIRS
FEW_ROWS_UP_TO_8(bf16, 1)
#else
#define few_rows_bf16 few_rows_fp32
#endif

/* A group of 64 numbers of a row of x, in the order in which its weights are decoded. */
INLINE void mix_group(const float *row, float *mixed, const int pairs) {
    float group[SMALL_GROUP];
    for (int j = 0; j < SMALL_GROUP; j++) group[j] = row[pairs ? MIXED_PAIRS(j) : MIXED(j)];
    write_row(group, SMALL_GROUP, mixed, pairs ? BF16 : FP32, 0);
}

INLINE int64_t tasks_of(const product *p) { return (p->N + SMALL_OUT - 1) / SMALL_OUT; }

/* `count` products of one x, which is mixed once; their tasks lie one behind the other. */
static void few_rows(const product *products, int count) {
    const product *p = products;
    float *mixed = p->workspace;
    int64_t tasks = 0;
    for (int i = 0; i < count; i++) tasks += tasks_of(p + i);
#pragma omp parallel num_threads(p->threads)
    {
        codebook code = load_codebook(p->q->code);
        const int pairs = PAIRS && in_pairs(p);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < p->K; k += SMALL_GROUP)
            for (int64_t m = 0; m < p->M; m++) {
                float row[SMALL_GROUP], *group = mixed + words_of(k * p->M + m * SMALL_GROUP, pairs);
                read_row(p->x, p->dtype, m * p->K + k, SMALL_GROUP, row);
                if (PAIRS && pairs)
                    mix_group(row, group, 1);
                else
                    mix_group(row, group, 0);
            }
/* Long runs of tasks, since each fetches ahead for the one behind it, then shorter ones as the threads get to them. */
#pragma omp for schedule(guided)
        for (int64_t task = 0; task < tasks; task++) {
            const product *own = products;
            int64_t first = task;
            for (; first >= tasks_of(own); own++) first -= tasks_of(own);
            if (code.level != own->q->code) code = load_codebook(own->q->code);
            (pairs ? few_rows_bf16 : few_rows_fp32)[p->M - 1](own, &code, mixed, first * SMALL_OUT);
        }
    }
}

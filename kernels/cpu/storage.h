/* storage.h: a quantized weight, and rows of fp32, bf16 or fp16 numbers. Included by kernels.c alone. */

enum { FP32, BF16, FP16 };

/* One QuantizedTensor (quant/tensor.py). library.py holds the same fields in the same order. */
typedef struct {
    const uint8_t *packed;
    const float *code;
    const float *absmax; /* NULL with double quantization */
    const uint8_t *absmax_8bit;
    const float *absmax_code;
    const float *absmax2;
    const float *absmax_offset;
    int64_t numel;
    int64_t shift, shift2; /* log2 of blocksize and blocksize2: a shift costs a tenth of a division */
} weight;

/* Two roundings (the compiler may not fuse them: -ffp-contract=off). */
INLINE float block_scale(const weight *q, int64_t block) {
    if (q->absmax) return q->absmax[block];
    return q->absmax_code[q->absmax_8bit[block]] * q->absmax2[block >> q->shift2] + *q->absmax_offset;
}

/* Weights first … first + n - 1, dequantized to fp32. `first` is even, and a multiple of 32 but in blocks' tails. */
INLINE void decode_span(const weight *q, const codebook *code, int64_t first, int64_t n, float *out) {
    for (int64_t i = first, stop = first + n; i < stop;) {
        int64_t block = i >> q->shift, block_end = (block + 1) << q->shift;
        int64_t end = block_end < stop ? block_end : stop;
        float scale = block_scale(q, block);
        vec scales = every(scale);
        for (; i + 32 <= end; i += 32, out += 32) {
            vec levels[32 / LANES];
            decode32(q->packed + (i >> 1), code, levels);
            for (int j = 0; j < 32 / LANES; j++) store(out + j * LANES, levels[j] * scales);
        }
        for (; i < end; i++, out++) {
            uint8_t byte = q->packed[i / 2];
            *out = code->level[i % 2 ? byte & 15 : byte >> 4] * scale;
        }
    }
}

/* bf16 is the upper half of an fp32; rounded to nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* fp16 without a compiler's half type: older ones have none. The magic numbers are powers of two that let the fp32
   adder do the rounding and the subnormals. */
INLINE uint16_t to_fp16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to 65536 or more: infinity */
    if (a < 0x38800000) {                                  /* below 2^-14: a multiple of 2^-24 */
        float f;
        memcpy(&f, &a, 4);
        f += 0.5f; /* fp32 steps in [1/2, 1) are 2^-24 */
        memcpy(&a, &f, 4);
        return (uint16_t)(sign | (a - 0x3f000000));
    }
    a += 0xfff + ((a >> 13) & 1);
    return (uint16_t)(sign | ((a - 0x38000000) >> 13));
}

INLINE float from_fp16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, a = h & 0x7fff, u;
    float x;
    if (a < 0x400) { /* subnormal: a · 2^-24 */
        x = (float)a * 0x1p-24f;
        memcpy(&u, &x, 4);
    } else {
        u = (a << 13) + (a < 0x7c00 ? 0x38000000 : 0x70000000);
    }
    u |= sign;
    memcpy(&x, &u, 4);
    return x;
}

INLINE vec load_bf16(const uint16_t *p) { return (vec)(load_wide16(p) << 16); }

INLINE void store_bf16(uint16_t *p, vec v) {
    uvec u = (uvec)v;
    ivec nan = (ivec)(((ivec)v & 0x7fffffff) > 0x7f800000);
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u = ((uvec)nan & 0x7fc0) | (~(uvec)nan & u);
    store_low16(p, u);
}

/* Of an fp32 or bf16 row, from element `at` on. */
INLINE vec load_as(const void *p, int dtype, int64_t at) {
    return dtype == FP32 ? load((const float *)p + at) : load_bf16((const uint16_t *)p + at);
}
INLINE float number_as(const void *p, int dtype, int64_t at) {
    return dtype == FP32 ? ((const float *)p)[at] : from_bf16(((const uint16_t *)p)[at]);
}

/* n numbers from element `at` of a row, as fp32. */
INLINE void read_row(const void *row, int dtype, int64_t at, int64_t n, float *out) {
    int64_t i = 0;
    if (dtype == FP32) {
        memcpy(out, (const float *)row + at, 4 * (size_t)n);
    } else if (dtype == BF16) {
        const uint16_t *p = (const uint16_t *)row + at;
        for (; i + LANES <= n; i += LANES) store(out + i, load_bf16(p + i));
        for (; i < n; i++) out[i] = from_bf16(p[i]);
    } else {
        const uint16_t *p = (const uint16_t *)row + at;
#if defined(ISA_AVX512) || defined(ISA_AVX2)
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + i))));
#endif
        for (; i < n; i++) out[i] = from_fp16(p[i]);
    }
}

INLINE float pair(float first, float second) {
    uint32_t both = (uint32_t)to_bf16(second) << 16 | to_bf16(first);
    float word;
    memcpy(&word, &both, 4);
    return word;
}

/* n fp32 numbers into a row from element `at` on, each rounded once. */
INLINE void write_row(const float *in, int64_t n, void *row, int dtype, int64_t at) {
    int64_t i = 0;
    if (dtype == FP32) {
        memcpy((float *)row + at, in, 4 * (size_t)n);
    } else if (dtype == BF16) {
        uint16_t *p = (uint16_t *)row + at;
        for (; i + LANES <= n; i += LANES) store_bf16(p + i, load(in + i));
        for (; i < n; i++) p[i] = to_bf16(in[i]);
    } else {
        uint16_t *p = (uint16_t *)row + at;
#if defined(ISA_AVX512) || defined(ISA_AVX2)
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i *)(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; i < n; i++) p[i] = to_fp16(in[i]);
    }
}

/* n numbers from element `at` of a row, fp32 or bf16, as pairs; an odd one has 0 beside it. The pairs are written as what
   they are read as: compilers may take a uint16_t and a float for two places. */
INLINE void copy_pairs(const void *row, int dtype, int64_t at, int64_t n, float *pairs) {
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        if (dtype == BF16)
            memcpy(pairs + i / 2, (const uint16_t *)row + at + i, 4 * LANES);
        else
            store(pairs + i / 2, load_pairs((const float *)row + at + i));
    for (; i < n; i += 2) {
        float two[2] = {0};
        read_row(row, dtype, at + i, i + 1 < n ? 2 : 1, two);
        pairs[i / 2] = pair(two[0], two[1]);
    }
}

/* simd.h: what the kernels need of a vector unit. Everything else is written once, in the vector types of GCC and Clang.

   kernels.c is compiled once per instruction set, with -DISA_AVX512 (and -DISA_AVX512_BF16), -DISA_AVX2 or neither
   (portable: SSE2, NEON or whatever the compiler has), and each time its functions carry the set's name. Only decode32,
   take, fma, the root, pairs and changes of width differ.

   decode32: 16 packed bytes → their 32 levels, in order, exactly the fp32 numbers of the code book. decode64_mixed:
   32 bytes → 64 levels, in whatever order is cheapest: place j is weight MIXED(j).
     AVX2      a level is 4 bytes; byte j of all 16 levels fits one register ("byte plane"), and PSHUFB is a table of
               16 bytes. 4 shuffles look up 32 weights, 8 unpacks put their bytes together again.
     AVX-512   VPERMPS is a table of 16 floats; of an index it reads the low nibble, so that a shift is all it asks.
     portable  a table of the 256 pairs that a byte can mean.
   dwords_of and look_up decode down a column of the weight: lane j of dwords[d] holds bytes 4d … 4d + 3 of row[j], and
   the level of every lane's low 4 bits comes from one table, whatever row it is of. */
#ifndef SIMD_H
#define SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(ISA_AVX512)
#include <immintrin.h>
#define LANES 16
#if defined(ISA_AVX512_BF16)
#define FOR_ISA(name) name##_avx512_bf16
#else
#define FOR_ISA(name) name##_avx512
#endif
#elif defined(ISA_AVX2)
#include <immintrin.h>
#define FOR_ISA(name) name##_avx2
#define LANES 8
#else
#define FOR_ISA(name) name##_portable
#define LANES 4
#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec_at *)p; }
INLINE void store(float *p, vec v) { *(vec_at *)p = v; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
INLINE vec magnitude(vec v) { return (vec)((ivec)v & 0x7fffffff); }

/* The upper half added to the lower one, again and again. */
INLINE float sum_lanes(vec v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) part[j] += part[j + width];
    return part[0];
}

#if defined(ISA_AVX512)
INLINE vec fma_(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vec every(float s) { return (vec)_mm512_set1_ps(s); }
INLINE vec root(vec v) { return (vec)_mm512_sqrt_ps((__m512)v); }
#elif defined(ISA_AVX2)
INLINE vec fma_(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vec every(float s) { return (vec)_mm256_set1_ps(s); }
INLINE vec root(vec v) { return (vec)_mm256_sqrt_ps((__m256)v); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
INLINE vec fma_(vec a, vec b, vec c) { return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE vec every(float s) { return (vec){s, s, s, s}; }
INLINE vec root(vec v) { return (vec)vsqrtq_f32((float32x4_t)v); }
#else
INLINE vec fma_(vec a, vec b, vec c) { return a * b + c; }
INLINE vec every(float s) { return (vec){s, s, s, s}; }
INLINE vec root(vec v) { return (vec){sqrtf(v[0]), sqrtf(v[1]), sqrtf(v[2]), sqrtf(v[3])}; }
#endif

/* Pairs: two bf16 numbers a lane, the first in its lower half. to_pairs rounds to nearest, ties to even, load_pairs does so
   with 2 · LANES numbers in a row; dot_pairs adds the products of both to a sum in fp32. PAIRS: the unit has instructions
   for them (which take subnormals for 0); without, they are here for the compiler alone, and nothing calls them. */
#if defined(ISA_AVX512_BF16)
#define PAIRS 1
INLINE vec dot_pairs(vec a, vec b, vec sum) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE vec to_pairs(vec first, vec second) {
    static const uint16_t in_turns[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); /* all firsts, then all seconds */
    return (vec)_mm512_permutexvar_epi16(_mm512_loadu_si512(in_turns), halves);
}
INLINE vec load_pairs(const float *p) {
    return (vec)_mm512_cvtne2ps_pbh((__m512)load(p + LANES), (__m512)load(p));
}
#else
#define PAIRS 0
INLINE uvec rounded16(vec v) { return (uvec)v + 0x7fff + ((uvec)v >> 16 & 1); }
INLINE vec to_pairs(vec first, vec second) { return (vec)(rounded16(first) >> 16 | (rounded16(second) & 0xffff0000)); }
INLINE vec dot_pairs(vec a, vec b, vec sum) {
    sum = fma_((vec)((uvec)a << 16), (vec)((uvec)b << 16), sum);
    return fma_((vec)((uvec)a & 0xffff0000), (vec)((uvec)b & 0xffff0000), sum);
}
INLINE vec load_pairs(const float *p) {
    vec first, second;
    for (int j = 0; j < LANES; j++) first[j] = p[2 * j], second[j] = p[2 * j + 1];
    return to_pairs(first, second);
}
#endif

/* table[index] in every lane, of 8 entries. The upper bits of an index must be 0. */
#if defined(ISA_AVX512)
INLINE vec take8(const float *table, ivec index) {
    __m512 twice = _mm512_broadcast_f32x8(_mm256_loadu_ps(table));
    return (vec)_mm512_permutexvar_ps((__m512i)index, twice);
}
#elif defined(ISA_AVX2)
INLINE vec take8(const float *table, ivec index) {
    return (vec)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
}
#else
INLINE vec take8(const float *table, ivec index) {
    vec taken;
    for (int j = 0; j < LANES; j++) taken[j] = table[index[j]];
    return taken;
}
#endif

/* The larger of each lane. */
#if defined(ISA_AVX512)
INLINE ivec larger_of(ivec a, ivec b) { return (ivec)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#elif defined(ISA_AVX2)
INLINE ivec larger_of(ivec a, ivec b) { return (ivec)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#else
INLINE ivec larger_of(ivec a, ivec b) {
    ivec larger = (ivec)(a > b);
    return (a & larger) | (b & ~larger);
}
#endif

/* pack32: 32 lanes of 0 … 15, each replaced by map[lane], as 16 bytes of two: the first in the high nibble. */
#if defined(ISA_AVX512)
INLINE void pack32(const ivec *lanes, const uint8_t *map, uint8_t *packed) {
    __m256i bytes = _mm256_setr_m128i(_mm512_cvtepi32_epi8((__m512i)lanes[0]), _mm512_cvtepi32_epi8((__m512i)lanes[1]));
    bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)map)), bytes);
    __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110)); /* 16 · first + second */
    _mm_storeu_si128((__m128i *)packed, _mm256_cvtepi16_epi8(pairs));
}
#elif defined(ISA_AVX2)
INLINE void pack32(const ivec *lanes, const uint8_t *map, uint8_t *packed) {
    __m256i first = _mm256_packs_epi32((__m256i)lanes[0], (__m256i)lanes[1]);
    __m256i bytes = _mm256_packus_epi16(first, _mm256_packs_epi32((__m256i)lanes[2], (__m256i)lanes[3]));
    bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)map)), bytes);
    __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110)); /* 16 · first + second */
    pairs = _mm256_packus_epi16(pairs, pairs); /* 4 weights of each of `lanes` in one half, 4 in the other */
    _mm_storeu_si128((__m128i *)packed,
                     _mm_unpacklo_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}
#else
INLINE void pack32(const ivec *lanes, const uint8_t *map, uint8_t *packed) {
    int32_t level[32];
    memcpy(level, lanes, sizeof level);
    for (int i = 0; i < 16; i++) packed[i] = (uint8_t)(map[level[2 * i]] << 4 | map[level[2 * i + 1]]);
}
#endif

/* The low half of every lane, one after another; and halves, widened. (What compilers make of __builtin_convertvector
   here takes LANES scalars apart.) */
#if defined(ISA_AVX512)
INLINE void store_low16(uint16_t *p, uvec v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)v)); }
INLINE uvec load_wide16(const uint16_t *p) {
    return (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}
#elif defined(ISA_AVX2)
INLINE void store_low16(uint16_t *p, uvec v) { /* v holds nothing but low halves: packing would saturate more */
    __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
INLINE uvec load_wide16(const uint16_t *p) {
    return (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
}
#else
INLINE void store_low16(uint16_t *p, uvec v) {
    for (int j = 0; j < LANES; j++) p[j] = (uint16_t)v[j];
}
INLINE uvec load_wide16(const uint16_t *p) { return (uvec){p[0], p[1], p[2], p[3]}; }
#endif

/* codebook: the 16 levels, as the unit looks them up. two_scales: what part `part` of the 64 levels is multiplied with,
   of SCALES_OF_64, where the first 32 weights have one scale and the others another. */

#if defined(ISA_AVX512)

typedef struct {
    const float *level;
    __m512 levels;
} codebook;

INLINE codebook load_codebook(const float *level) { return (codebook){level, _mm512_loadu_ps(level)}; }

/* Loaded once, though it is used twice: compilers like to load a vector again with each use. */
INLINE vec once(vec v) {
    __asm__("" : "+v"(v));
    return v;
}

INLINE codebook times(const codebook *code, float scale) {
    return (codebook){code->level, _mm512_mul_ps(code->levels, _mm512_set1_ps(scale))};
}

INLINE vec look_up(const codebook *code, uvec index) {
    return (vec)_mm512_permutexvar_ps((__m512i)index, code->levels); /* reads the low 4 bits of an index */
}

INLINE __m512i four_rows(const uint8_t *const *row) { /* 16 bytes of rows 0, 4, 8, 12 */
    __m512i all = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)row[0]));
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)row[4]), 1);
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)row[8]), 2);
    return _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)row[12]), 3);
}

INLINE void dwords_of(const uint8_t *const *row, uvec *dwords) {
    __m512i a = four_rows(row), b = four_rows(row + 1), c = four_rows(row + 2), d = four_rows(row + 3);
    __m512i lower = _mm512_unpacklo_epi32(a, b), upper = _mm512_unpacklo_epi32(c, d);
    dwords[0] = (uvec)_mm512_unpacklo_epi64(lower, upper);
    dwords[1] = (uvec)_mm512_unpackhi_epi64(lower, upper);
    lower = _mm512_unpackhi_epi32(a, b), upper = _mm512_unpackhi_epi32(c, d);
    dwords[2] = (uvec)_mm512_unpacklo_epi64(lower, upper);
    dwords[3] = (uvec)_mm512_unpackhi_epi64(lower, upper);
}

INLINE void decode32(const uint8_t *packed, const codebook *code, vec *levels) {
    const __m512i shift = _mm512_set1_epi64(4); /* dword 0 by 4 (the high nibble comes first), dword 1 by 0 */
    __m128i bytes = _mm_loadu_si128((const __m128i *)packed);
    __m512i first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
    __m512i second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(bytes, bytes));
    levels[0] = look_up(code, (uvec)_mm512_srlv_epi32(first, shift));
    levels[1] = look_up(code, (uvec)_mm512_srlv_epi32(second, shift));
}

/* Dword d holds weights 8d … 8d + 7: a lane of the lower half takes the first four, of the upper half the others. */
INLINE void decode64_mixed(const uint8_t *packed, const codebook *code, vec *levels) {
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(16), 1);
    __m512i index = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)packed));
    index = _mm512_srlv_epi32(index, half);
    levels[0] = (vec)_mm512_permutexvar_ps(index, code->levels);
    levels[1] = (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), code->levels);
    levels[2] = (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(index, 8), code->levels);
    levels[3] = (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(index, 12), code->levels);
}
#define MIXED(j) ((j) % 8 * 8 + (j) % 16 / 8 * 4 + (j) / 32 * 2 + 1 - (j) / 16 % 2) /* the high nibble comes first */

INLINE vec two_scales(float first, float second, int part) {
    (void)part; /* every vector has lanes of both */
    return (vec)_mm512_mask_blend_ps(0xf0f0, (__m512)every(first), (__m512)every(second));
}
#define SCALES_OF_64 1

#if PAIRS
/* 32 bytes → 64 weights as pairs, in whatever order is cheapest: place j is weight MIXED_PAIRS(j). VPERMW reads the low 5
   bits of an index, so that it looks a nibble up in 16 bf16 numbers that are there twice. The first 32 weights have one
   scale, the others another. */
INLINE __m512i scaled_levels(const codebook *code, float scale) {
    __m256i levels = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(code->levels, _mm512_set1_ps(scale)));
    return _mm512_broadcast_i64x4(levels);
}
INLINE void decode64_pairs(const uint8_t *packed, const codebook *code, float scale, float next, int one_scale, vec *pairs) {
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    __m512i index = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)packed));
    index = _mm512_srlv_epi16(index, half);
    const __m512i levels = scaled_levels(code, scale), later = _mm512_srli_epi16(index, 8);
    pairs[0] = (vec)_mm512_permutexvar_epi16(index, levels);
    pairs[1] = (vec)_mm512_permutexvar_epi16(later, levels);
    if (one_scale) return;
    const __m512i others = scaled_levels(code, next);
    pairs[0] = (vec)_mm512_mask_permutexvar_epi16((__m512i)pairs[0], 0xff00ff00, index, others);
    pairs[1] = (vec)_mm512_mask_permutexvar_epi16((__m512i)pairs[1], 0xff00ff00, later, others);
}
#define MIXED_PAIRS(j) ((j) % 16 * 4 + (j) / 32 * 2 + 1 - (j) / 16 % 2)
#endif

#elif defined(ISA_AVX2)

typedef struct {
    const float *level;
    __m256i plane[4];
} codebook;

INLINE codebook load_codebook(const float *level) {
    codebook code = {level, {{0}}};
    for (int j = 0; j < 4; j++) {
        uint8_t plane[16];
        for (int i = 0; i < 16; i++) memcpy(plane + i, (const uint8_t *)(level + i) + j, 1);
        code.plane[j] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)plane));
    }
    return code;
}

INLINE vec look_up(const codebook *code, uvec index) { /* VPERMPS reads the low 3 bits of an index; bit 3 chooses */
    __m256 lower = _mm256_permutevar8x32_ps(_mm256_loadu_ps(code->level), (__m256i)index);
    __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(code->level + 8), (__m256i)index);
    return (vec)_mm256_blendv_ps(lower, upper, (__m256)(index << 28));
}

INLINE __m256i two_rows(const uint8_t *const *row) { /* 16 bytes of rows 0, 4 */
    return _mm256_loadu2_m128i((const __m128i *)row[4], (const __m128i *)row[0]);
}

INLINE void dwords_of(const uint8_t *const *row, uvec *dwords) {
    __m256i a = two_rows(row), b = two_rows(row + 1), c = two_rows(row + 2), d = two_rows(row + 3);
    __m256i lower = _mm256_unpacklo_epi32(a, b), upper = _mm256_unpacklo_epi32(c, d);
    dwords[0] = (uvec)_mm256_unpacklo_epi64(lower, upper);
    dwords[1] = (uvec)_mm256_unpackhi_epi64(lower, upper);
    lower = _mm256_unpackhi_epi32(a, b), upper = _mm256_unpackhi_epi32(c, d);
    dwords[2] = (uvec)_mm256_unpacklo_epi64(lower, upper);
    dwords[3] = (uvec)_mm256_unpackhi_epi64(lower, upper);
}

INLINE void look_up32(__m256i index, const codebook *code, vec *levels) {
    __m256i b0 = _mm256_shuffle_epi8(code->plane[0], index), b1 = _mm256_shuffle_epi8(code->plane[1], index);
    __m256i b2 = _mm256_shuffle_epi8(code->plane[2], index), b3 = _mm256_shuffle_epi8(code->plane[3], index);
    __m256i lo01 = _mm256_unpacklo_epi8(b0, b1), lo23 = _mm256_unpacklo_epi8(b2, b3);
    __m256i hi01 = _mm256_unpackhi_epi8(b0, b1), hi23 = _mm256_unpackhi_epi8(b2, b3);
    levels[0] = (vec)_mm256_unpacklo_epi16(lo01, lo23);
    levels[1] = (vec)_mm256_unpackhi_epi16(lo01, lo23);
    levels[2] = (vec)_mm256_unpacklo_epi16(hi01, hi23);
    levels[3] = (vec)_mm256_unpackhi_epi16(hi01, hi23);
}

INLINE void decode32(const uint8_t *packed, const codebook *code, vec *levels) {
    /* Each byte twice, its two weights' places; which bytes go to which half is what the unpacks ask for. */
    const __m256i twice = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,
                                           2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
    __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)packed));
    bytes = _mm256_shuffle_epi8(bytes, twice);
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi16(0x000f));
    look_up32(_mm256_or_si256(high, _mm256_and_si256(bytes, _mm256_set1_epi16(0x0f00))), code, levels);
}

/* Cheaper: no byte moves. The weights of even numbers come first; a lane of 128 bits has 32 weights. */
INLINE void decode64_mixed(const uint8_t *packed, const codebook *code, vec *levels) {
    const __m256i nibble = _mm256_set1_epi8(0x0f);
    __m256i bytes = _mm256_loadu_si256((const __m256i *)packed);
    look_up32(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), code, levels);
    look_up32(_mm256_and_si256(bytes, nibble), code, levels + 4);
}
#define MIXED(j) ((j) % 8 / 4 * 32 + (j) / 8 % 4 * 8 + (j) % 4 * 2 + (j) / 32)

INLINE vec two_scales(float first, float second, int part) {
    (void)part; /* every vector has lanes of both */
    return (vec)_mm256_blend_ps((__m256)every(first), (__m256)every(second), 0xf0);
}
#define SCALES_OF_64 1

#else

typedef struct {
    const float *level;
    float pair[256][2];
} codebook;

INLINE codebook load_codebook(const float *level) {
    codebook code;
    code.level = level;
    for (int byte = 0; byte < 256; byte++) {
        code.pair[byte][0] = level[byte >> 4];
        code.pair[byte][1] = level[byte & 15];
    }
    return code;
}

INLINE vec look_up(const codebook *code, uvec index) {
    vec levels;
    for (int j = 0; j < LANES; j++) levels[j] = code->level[index[j] & 15];
    return levels;
}

INLINE void dwords_of(const uint8_t *const *row, uvec *dwords) {
    for (int d = 0; d < 4; d++)
        for (int j = 0; j < LANES; j++) {
            const uint8_t *b = row[j] + 4 * d;
            dwords[d][j] = b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
        }
}

INLINE void decode32(const uint8_t *packed, const codebook *code, vec *levels) {
    for (int i = 0; i < 16; i++) memcpy((float *)levels + 2 * i, code->pair[packed[i]], 8);
}

INLINE void decode64_mixed(const uint8_t *packed, const codebook *code, vec *levels) {
    decode32(packed, code, levels);
    decode32(packed + 16, code, levels + 32 / LANES);
}
#define MIXED(j) (j)

INLINE vec two_scales(float first, float second, int part) { return every(part ? second : first); }
#define SCALES_OF_64 2

#endif

#endif

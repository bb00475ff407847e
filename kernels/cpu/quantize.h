/* quantize.h: dequantize, and quantize with both of its levels. What quant/blockwise.py and quant/double_quant.py
   define, to the bit. Included by kernels.c alone. */

enum { CHUNK = 4096 }; /* weights handled at a time: the largest block, and a buffer that stays in the L1 cache */

void FOR_ISA(dequantize)(const weight *q, void *out, int dtype, int threads) {
    int64_t chunks = (q->numel + CHUNK - 1) / CHUNK;
    codebook code = load_codebook(q->code);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t first = chunk * CHUNK, n = q->numel - first < CHUNK ? q->numel - first : CHUNK;
        if (dtype == FP32) {
            decode_span(q, &code, first, n, (float *)out + first);
        } else {
            float values[CHUNK];
            decode_span(q, &code, first, n, values);
            write_row(values, n, out, dtype, first);
        }
    }
}

/* A search tree over the 15 midpoints between the levels in order (+inf where a code book has fewer): step s compares
   with one of its 2^s midpoints. Then the index of each level. */
typedef struct {
    float midpoints[4][8];
    uint8_t index[16];
} nearest;

/* The place of the nearest level: how many midpoints lie strictly below x, found bit by bit. */
INLINE ivec nearest_level(vec x, const nearest *code) {
    ivec below = -(ivec)(x > every(code->midpoints[0][0]));
    for (int step = 1; step < 4; step++) below = below + below - (ivec)(x > take8(code->midpoints[step], below));
    return below;
}

/* max |x| of a block of whole vectors; not finite when the block holds NaN or infinity. The bits of magnitudes are
   ordered as their values are, and infinity and NaN lie above all others. */
INLINE float block_absmax(const float *x, int64_t n) {
    ivec most[4] = {{0}};
    for (int64_t i = 0; i < n; i += 32)
        for (int j = 0; j < 32 / LANES; j++)
            most[j % 4] = larger_of(most[j % 4], (ivec)magnitude(load(x + i + j * LANES)));
    ivec all = larger_of(larger_of(most[0], most[1]), larger_of(most[2], most[3]));
    int32_t bits = 0;
    for (int j = 0; j < LANES; j++) bits = all[j] > bits ? all[j] : bits;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

INLINE void quantize_block(const float *x, int64_t n, float inverse, const nearest *code, uint8_t *packed) {
    for (int64_t i = 0; i < n; i += 32) {
        ivec levels[32 / LANES];
        for (int j = 0; j < 32 / LANES; j++) levels[j] = nearest_level(load(x + i + j * LANES) * every(inverse), code);
        pack32(levels, code->index, packed + i / 2);
    }
}

/* Blocks of n weights, a multiple of 32: fills packed and absmax. Returns 1 when x holds NaN or infinity. */
INLINE int quantize_blocks(const float *x, int64_t n, int64_t blocksize, const nearest *code, uint8_t *packed,
                           float *absmax) {
    int bad = 0;
    for (int64_t i = 0; i < n; i += blocksize) {
        int64_t block = n - i < blocksize ? n - i : blocksize;
        float most = block_absmax(x + i, block), inverse = 1 / most;
        bad |= !isfinite(most);
        if (!isfinite(inverse)) most = inverse = 0;
        absmax[i / blocksize] = most;
        quantize_block(x + i, block, inverse, code, packed + i / 2);
    }
    return bad;
}

/* x (n,) → packed (⌈n/2⌉,) and absmax (⌈n/blocksize⌉,). Returns 1 when x holds NaN or infinity. */
int FOR_ISA(quantize)(const void *x, int dtype, int64_t n, int64_t blocksize, const nearest *code, uint8_t *packed,
                      float *absmax, int threads) {
    int bad = 0;
    int64_t chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t first = chunk * CHUNK, length = n - first < CHUNK ? n - first : CHUNK;
        float *scales = absmax + first / blocksize;
        if (dtype == FP32 && length == CHUNK) {
            bad |= quantize_blocks((const float *)x + first, CHUNK, blocksize, code, packed + first / 2, scales);
            continue;
        }
        float values[CHUNK];
        uint8_t bytes[CHUNK / 2];
        int64_t padded = (length + 31) / 32 * 32;
        read_row(x, dtype, first, length, values);
        for (int64_t i = length; i < padded; i++) values[i] = 0;
        bad |= quantize_blocks(values, padded, blocksize, code, bytes, scales);
        memcpy(packed + first / 2, bytes, (size_t)(length + 1) / 2);
    }
    return bad;
}

/* A map of 256 sorted levels. threshold[i]: the least fp32 that is nearer to level i + 1 than to level i, or as near and
   i + 1 is even; 255: infinity. first[u]: how many thresholds lie at or below every fp32 whose upper half is u. No such
   range holds two of them. */
typedef struct {
    const float *level, *threshold;
    const uint8_t *first;
} map_8bit;

/* The index of the nearest level, a tie to the even one. */
INLINE uint8_t nearest_8bit(float x, const map_8bit *map) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint8_t code = map->first[bits >> 16];
    return (uint8_t)(code + (x >= map->threshold[code]));
}

/* absmax (n,) → absmax_8bit (n,), absmax2 (⌈n/256⌉,) and the offset, their mean, summed in index order. */
void FOR_ISA(quantize_absmax)(const float *absmax, int64_t n, const map_8bit *map, uint8_t *absmax_8bit,
                              float *absmax2, float *offset, int threads) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += absmax[i];
    float mean = (float)(sum / (double)n);
    *offset = mean;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (n + 255) / 256; block++) {
        int64_t first = block * 256, length = n - first < 256 ? n - first : 256;
        float most = 0;
        for (int64_t i = first; i < first + length; i++) {
            float size = fabsf(absmax[i] - mean);
            most = size > most ? size : most;
        }
        float inverse = 1 / most;
        if (!isfinite(inverse)) most = inverse = 0;
        absmax2[block] = most;
        for (int64_t i = first; i < first + length; i++)
            absmax_8bit[i] = nearest_8bit((absmax[i] - mean) * inverse, map);
    }
}

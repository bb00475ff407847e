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
   with one of its 2^s midpoints. Then the index of each level, as bits of a float. */
typedef struct {
    float midpoints[4][8];
    float index[16];
} nearest;

/* The index of the nearest level: how many midpoints lie strictly below x, found bit by bit. */
INLINE ivec nearest_index(vec x, const nearest *code) {
    ivec below = (ivec)(x > every(code->midpoints[0][0])) & 1;
    for (int step = 1; step < 4; step++) below = below * 2 - (ivec)(x > take8(code->midpoints[step], below));
    return (ivec)take16(code->index, below);
}

/* max |x| of a block padded with zeros to whole vectors; not finite when the block holds NaN or infinity. The bits of
   magnitudes are ordered as their values are, and infinity and NaN lie above all others. */
INLINE float block_absmax(const float *x, int64_t n) {
    ivec most = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        ivec size = (ivec)magnitude(load(x + i)), larger = (ivec)(size > most);
        most = (size & larger) | (most & ~larger);
    }
    int32_t bits = 0;
    for (int j = 0; j < LANES; j++) bits = most[j] > bits ? most[j] : bits;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

INLINE void quantize_block(const float *x, int64_t n, float inverse, const nearest *code, uint8_t *indices) {
    for (int64_t i = 0; i < n; i += LANES)
        store_low8(indices + i, nearest_index(load(x + i) * inverse, code));
}

/* x (n,) → packed (⌈n/2⌉,) and absmax (⌈n/blocksize⌉,). Returns 1 when x holds NaN or infinity. */
int FOR_ISA(quantize)(const void *x, int dtype, int64_t n, int64_t blocksize, const nearest *code, uint8_t *packed,
                      float *absmax, int threads) {
    int bad = 0;
    int64_t chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t first = chunk * CHUNK, length = n - first < CHUNK ? n - first : CHUNK;
        float values[CHUNK];
        uint8_t indices[CHUNK], bytes[CHUNK / 2];
        int64_t padded = (length + 31) / 32 * 32;
        read_row(x, dtype, first, length, values);
        for (int64_t i = length; i < padded; i++) values[i] = 0;
        for (int64_t i = 0; i < padded; i += blocksize) {
            int64_t block = padded - i < blocksize ? padded - i : blocksize;
            float most = block_absmax(values + i, block), inverse = 1 / most;
            bad |= !isfinite(most);
            if (!isfinite(inverse)) most = inverse = 0;
            absmax[(first + i) / blocksize] = most;
            quantize_block(values + i, block, inverse, code, indices + i);
        }
        for (int64_t i = 0; i < padded / 2; i++) bytes[i] = (uint8_t)(indices[2 * i] << 4 | indices[2 * i + 1]);
        memcpy(packed + first / 2, bytes, (size_t)(length + 1) / 2);
    }
    return bad;
}

/* Index of the nearest of 256 sorted levels, a tie to the even one. Differences of fp32 numbers in double: a tie is a
   tie. */
INLINE uint8_t nearest_even(float x, const float *code) {
    int upper = 0;
    for (int step = 128; step; step /= 2)
        if (code[upper + step - 1] < x) upper += step;
    upper = upper < 1 ? 1 : upper;
    double to_lower = (double)x - code[upper - 1], to_upper = (double)code[upper] - x;
    int take_upper = to_upper < to_lower || (to_upper == to_lower && upper % 2 == 0);
    return (uint8_t)(take_upper ? upper : upper - 1);
}

/* absmax (n,) → absmax_8bit (n,), absmax2 (⌈n/256⌉,) and the offset, their mean, summed in index order. */
void FOR_ISA(quantize_absmax)(const float *absmax, int64_t n, const float *code, uint8_t *absmax_8bit, float *absmax2,
                              float *offset, int threads) {
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
            absmax_8bit[i] = nearest_even((absmax[i] - mean) * inverse, code);
    }
}

/* Weights in fewer bits, as numbers. */

#include "numbers.h"

/* Scales are fp32, or (with `coarse`) codes of 8 bits, for each `block` numbers. */
struct codes {
    const uint8_t *codes;
    const void *scales;
    const float *coarse, *offset, *map, *levels;
    size block, bits;
};

/* Rounded before anything is added to it: inlined, a compiler would make one operation of both. */
static __attribute__((noinline)) float multiplied(float a, float b) { return a * b; }

INLINE float scale_of(const struct codes *of, size block)
{
    if (!of->coarse) return ((const float *)of->scales)[block];
    return multiplied(of->map[((const uint8_t *)of->scales)[block]], of->coarse[block / 256]) + *of->offset;
}

/* Eight codes, the first in the highest bits. */
INLINE uint32_t eight(const uint8_t *codes, int bits)
{
    uint32_t all = 0;
    for (int i = 0; i < bits; i++) all = all << 8 | codes[i];
    return all;
}

/* What 16 codes of 2, 3 or 4 bits stand for, the levels of all codes being in one register; or of 8 bits the numbers. */
INLINE floats meant(const uint8_t *codes, floats levels, int bits)
{
#if AVX512
    if (bits == 8) return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
    if (bits == 4) {
        __m128i both = _mm_loadl_epi64((const __m128i *)codes), first = _mm_srli_epi16(both, 4); /* and bits of others */
        __m512i each = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(first, both));
        return (floats)_mm512_permutexvar_ps(each, (__m512)levels); /* which looks at the lowest four bits alone */
    }
#else
    if (bits == 8) {
        float read[LANES];
        for (int i = 0; i < LANES; i++) read[i] = ((const int8_t *)codes)[i];
        return load_floats(read, LANES);
    }
#endif
    ints second = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
    words place = {7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0};
    words both = (eight(codes + bits, bits) & (words)second) | (eight(codes, bits) & ~(words)second);
    return __builtin_shuffle(levels, (ints)(both >> place * bits & ((1u << bits) - 1)));
}

INLINE void decode_block(const uint8_t *codes, floats levels, float scale, number *out, size count, int bits)
{
    size i = 0;
    for (; i + LANES <= count; i += LANES) store(out + i, meant(codes + i * bits / 8, levels, bits) * scale, LANES);
    if (i < count) { /* what lies behind the last code may be nobody's */
        uint8_t rest[LANES] = {0};
        memcpy(rest, codes + i * bits / 8, ((count - i) * bits + 7) / 8);
        store(out + i, meant(rest, levels, bits) * scale, count - i);
    }
}

/* The numbers from place `start` on, where a byte begins. */
static void decode_part(const struct codes *of, size start, size count, number *out)
{
    floats levels = of->levels ? load_floats(of->levels, 1 << of->bits) : all(0);
    for (size from = start, some; from < start + count; from += some, out += some) {
        size left = of->block - from % of->block, bits = of->bits;
        some = start + count - from < left ? start + count - from : left;
        float scale = scale_of(of, from / of->block);
        const uint8_t *own = of->codes + from * bits / 8;
        if (bits == 8) decode_block(own, levels, scale / 127, out, some, 8);
        else if (bits == 4) decode_block(own, levels, scale, out, some, 4);
        else if (bits == 3) decode_block(own, levels, scale, out, some, 3);
        else decode_block(own, levels, scale, out, some, 2);
    }
}

/* Numbers of BITS bits, in vectors, and what the loops do with them. */

#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };
typedef int64_t size;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))
/* A loop that is written out, so that arrays of vectors stay in registers. */
#define EACH(i, n) _Pragma("GCC unroll 8") for (size i = 0; i < n; i++)

static inline floats all(float x) { return x - (floats){0}; }
static inline floats choose(ints which, floats yes, floats no)
{
    return (floats)((which & (ints)yes) | (~which & (ints)no));
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define AVX512 1
static inline uint16_t lanes(size n) { return n >= LANES ? 0xffff : (1u << n) - 1; } /* a bit for each that counts */
#else
#define AVX512 0
#endif

#if BITS == 16
typedef uint16_t number; /* the upper half of a float */
typedef uint16_t numbers __attribute__((vector_size(2 * LANES)));
static inline floats widen(numbers x)
{
#if AVX512
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#else
    return (floats)(__builtin_convertvector(x, words) << 16);
#endif
}
static inline numbers narrow(floats x) /* to the nearest, ties to even */
{
#ifdef __AVX512BF16__
    return (numbers)_mm512_cvtneps_pbh((__m512)x);
#else
    words bits = (words)x;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, numbers);
#endif
}
#else
typedef float number;
typedef floats numbers;
static inline floats widen(numbers x) { return x; }
static inline numbers narrow(floats x) { return x; }
#endif
static inline floats rounded(floats x) { return widen(narrow(x)); }

/* The first n of 16 numbers; the others are 0 when read and left alone when written. */
static inline floats load(const number *from, size n)
{
#if AVX512 && BITS == 16
    return widen((numbers)_mm256_maskz_loadu_epi16(lanes(n), from));
#elif AVX512
    return (floats)_mm512_maskz_loadu_ps(lanes(n), from);
#else
    numbers x = {0};
    if (n >= LANES) memcpy(&x, from, sizeof x);
    else memcpy(&x, from, n * sizeof *from);
    return widen(x);
#endif
}
static inline void store(number *to, floats x, size n)
{
    numbers y = narrow(x);
    if (n >= LANES) memcpy(to, &y, sizeof y);
#if AVX512 && BITS == 16
    else _mm256_mask_storeu_epi16(to, lanes(n), (__m256i)y);
#elif AVX512
    else _mm512_mask_storeu_ps(to, lanes(n), (__m512)y);
#else
    else memcpy(to, &y, n * sizeof *to);
#endif
}
static inline floats load_floats(const float *from, size n)
{
#if AVX512
    return (floats)_mm512_maskz_loadu_ps(lanes(n), from);
#else
    floats x = {0};
    memcpy(&x, from, (n < LANES ? n : LANES) * sizeof *from);
    return x;
#endif
}
static inline void store_floats(float *to, floats x, size n) { memcpy(to, &x, (n < LANES ? n : LANES) * sizeof *to); }
static inline floats larger(floats x, floats y) /* y where x is no number */
{
#if AVX512
    return (floats)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return choose(x > y, x, y);
#endif
}
static inline floats within(floats x, float low, float high) /* no number where x is none */
{
    return choose(x < low, all(low), choose(x > high, all(high), x));
}
static inline floats swapped(floats x, int by) /* lanes that are `by` apart change places */
{
    ints place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(x, place ^ by);
}
static inline float total(floats x)
{
    for (int by = LANES / 2; by > 0; by /= 2) x += swapped(x, by);
    return x[0];
}
static inline float highest(floats x)
{
    for (int by = LANES / 2; by > 0; by /= 2) x = choose(swapped(x, by) > x, swapped(x, by), x);
    return x[0];
}
/* The first n of 16 numbers, and `rest` in the place of the others. */
static inline floats first(size n, floats x, float rest)
{
    ints place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return n >= LANES ? x : choose(place < (int)n, x, all(rest));
}

/* exp to 2e-7 of itself: 2^n · e^r with r within ±ln 2 / 2; 0 below -87, which is what minus infinity gives. */
static inline floats exponential(floats x)
{
#if AVX512
    /* Of two numbers min and max take the second where one is none. */
    /* What lies below would be computed with many times as slowly. */
    __mmask16 high = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    x = (floats)_mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), (__m512)x));
    floats n = (floats)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    ints low = x < -87.0f;
    x = choose(x > 88.0f, all(88.0f), choose(low, all(-87.0f), x));
    floats n = x * 1.44269504f + 12582912.0f; /* rounds to a whole number */
    ints whole = (ints)n - 0x4b400000;
    n -= 12582912.0f;
#endif
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if AVX512
    return (floats)_mm512_maskz_scalef_ps(high, (__m512)p, (__m512)n);
#else
    return choose(low, all(0), p * (floats)((whole + 127) << 23));
#endif
}
static inline floats sigmoid(floats x)
{
    floats y = 1.0f + exponential(-x);
#if AVX512
    floats guess = (floats)_mm512_rcp14_ps((__m512)y); /* and a step of Newton's: dividing takes several times as long */
    return guess * (2.0f - y * guess);
#else
    return 1.0f / y;
#endif
}

static inline size filled(size n) { return (n + LANES - 1) / LANES * LANES; } /* up to whole registers */

/* 16 words of random bits for the place and the seed: two rounds of multiplying and folding, as hash tables do. */
static inline words scattered(uint32_t place, uint32_t seed, uint32_t stream)
{
    words x = place + (words){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    x = (x ^ (x >> 16) ^ seed) * 0x21f0aaadu;
    x = (x ^ (x >> 15) ^ stream) * 0x735a2d97u;
    return x ^ (x >> 15);
}

static inline uint64_t mixed(uint64_t x) /* SplitMix64: seeds that are near each other are far apart then */
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Matrices are multiplied in units of 32 bits: two numbers next to each other along what is summed over, where the
   processor multiplies such pairs, otherwise one in fp32. */
#if BITS == 16 && AVX512 && defined(__AVX512BF16__)
#define PAIRED 1
enum { PAIR = 2 };
typedef uint32_t unit;
typedef words units;
INLINE floats add_product(floats sums, unit one, units many)
{
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(one), (__m512bh)many);
}
INLINE units paired(floats a, floats b)
{
    return (words)_mm512_cvtepu16_epi32((__m256i)narrow(a)) | (words)_mm512_cvtepu16_epi32((__m256i)narrow(b)) << 16;
}
INLINE units beside(const number *a, const number *b) /* `paired`, of 16 numbers each */
{
    numbers one, two;
    memcpy(&one, a, sizeof one), memcpy(&two, b, sizeof two);
    return (words)_mm512_cvtepu16_epi32((__m256i)one) | (words)_mm512_cvtepu16_epi32((__m256i)two) << 16;
}
INLINE void put(unit *row, size at, floats x) /* 16 numbers of a row, which are summed over along the row */
{
    numbers y = narrow(x);
    memcpy((number *)row + at, &y, sizeof y);
}
#else
#define PAIRED 0
enum { PAIR = 1 };
typedef float unit;
typedef floats units;
INLINE floats add_product(floats sums, unit one, units many) { return sums + one * many; }
INLINE units paired(floats a, floats b) { return a; }
INLINE void put(unit *row, size at, floats x) { memcpy(row + at, &x, sizeof x); }
#endif

/* 16 rows of 16 units become 16 columns. */
#if AVX512
INLINE void transpose(const unit *from, size stride, unit *to, size width)
{
    __m512i a[LANES], b[LANES];
    EACH(i, 8) a[i] = _mm512_loadu_si512(from + i * stride), a[8 + i] = _mm512_loadu_si512(from + (8 + i) * stride);
    EACH(i, 8) b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]), b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    EACH(i, 4) EACH(j, 2)
    {
        a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + 2 + j]);
        a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + 2 + j]);
    }
    EACH(i, 4) EACH(j, 2)
    {
        b[8 * j + i] = _mm512_shuffle_i32x4(a[8 * j + i], a[8 * j + 4 + i], 0x88);
        b[8 * j + 4 + i] = _mm512_shuffle_i32x4(a[8 * j + i], a[8 * j + 4 + i], 0xdd);
    }
    EACH(i, 8)
    {
        _mm512_storeu_si512(to + i * width, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
        _mm512_storeu_si512(to + (8 + i) * width, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
    }
}
#else
INLINE void transpose(const unit *from, size stride, unit *to, size width)
{
    for (size r = 0; r < LANES; r++)
        for (size k = 0; k < LANES; k++) to[k * width + r] = from[r * stride + k];
}
#endif

/* scale · the sums (rows, width) of all threads, which lie `each` numbers apart, as (width, rows), each column times and over
   what is there for it; within their region. */
static inline void add_up(const float *sums, size each, float *to, const float *times, const float *over, size rows, size width,
                          float scale)
{
    size threads = omp_get_num_threads();
#pragma omp for schedule(static) nowait
    for (size i = 0; i < width; i++)
        for (size row = 0; row < rows; row++) {
            float sum = sums[row * width + i], by = times ? scale * times[i] : scale;
            for (size thread = 1; thread < threads; thread++) sum += sums[thread * each + row * width + i];
            to[i * rows + row] = over ? by * sum / over[i] : by * sum;
        }
}

/* A·Aᵀ for rows of fp32. */
static inline void gram(const float *A, float *G, size rank, size width)
{
    for (size k = 0; k < rank; k++)
        for (size j = 0; j <= k; j++) {
            floats sum = {0};
            for (size i = 0; i < width; i += LANES)
                sum += load_floats(A + k * width + i, width - i) * load_floats(A + j * width + i, width - i);
            G[k * rank + j] = G[j * rank + k] = total(sum);
        }
}

/* What a training step does between its matrix products: each loop here reads its inputs once, computes in fp32 and
   writes its outputs once. PyTorch makes several passes of each, with what lies between them in memory.

   Numbers have BITS bits: 16 (bf16) or 32 (fp32). Every matrix is dense and row-major. Threads share the rows, always
   in the same way, and what several have summed is added in their order: the same inputs on as many threads give the
   same bits. The vectors are those of GCC and Clang: 16 numbers, in as many registers as the processor needs. What each
   function computes stands beside its operator in __init__.py. */

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
const int32_t wide_registers = AVX512;

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

/* Norms --------------------------------------------------------------------------------------------------------- */

void rms_norm(const number *x, const number *weight, float epsilon, number *y, float *scales, size rows, size width)
{
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++) {
        const number *from = x + row * width;
        floats squares = {0};
        for (size i = 0; i < width; i += LANES) {
            floats now = load(from + i, width - i);
            squares += now * now;
        }
        float scale = scales[row] = 1.0f / sqrtf(total(squares) / width + epsilon);
        for (size i = 0; i < width; i += LANES)
            store(y + row * width + i, rounded(load(from + i, width - i) * scale) * load(weight + i, width - i), width - i);
    }
}

void rms_norm_backward(const number *x, const number *weight, const float *scales, const number *dy, number *dx, size rows,
                       size width)
{
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++) {
        size begin = row * width;
        floats products = {0};
        for (size i = 0; i < width; i += LANES)
            products += load(x + begin + i, width - i) * load(dy + begin + i, width - i) * load(weight + i, width - i);
        float scale = scales[row], shared = total(products) * scale * scale / width;
        for (size i = 0; i < width; i += LANES) {
            floats g = load(dy + begin + i, width - i) * load(weight + i, width - i);
            store(dx + begin + i, (g - load(x + begin + i, width - i) * shared) * scale, width - i);
        }
    }
}

/* Activations --------------------------------------------------------------------------------------------------- */

void gated_silu(const number *gate, const number *up, number *y, size count)
{
#pragma omp parallel for schedule(static)
    for (size i = 0; i < count; i += LANES) {
        floats g = load(gate + i, count - i);
        store(y + i, rounded(g * sigmoid(g)) * load(up + i, count - i), count - i);
    }
}

void gated_silu_backward(const number *gate, const number *up, const number *dy, number *dgate, number *dup, size count)
{
#pragma omp parallel for schedule(static)
    for (size i = 0; i < count; i += LANES) {
        floats g = load(gate + i, count - i), d = load(dy + i, count - i), s = sigmoid(g);
        store(dup + i, d * g * s, count - i);
        store(dgate + i, d * load(up + i, count - i) * s * (1.0f + g * (1.0f - s)), count - i);
    }
}

/* Positions ----------------------------------------------------------------------------------------------------- */

/* Turns the pairs (i, i + half) of every head; with sign −1 back. cos and sin have the two numbers one after another. */
void rotate(const number *x, const number *cosines, const number *sines, number *y, float sign, size tokens, size heads,
            size half)
{
#pragma omp parallel for schedule(static)
    for (size token = 0; token < tokens; token++)
        for (size head = 0; head < heads; head++) {
            size begin = (token * heads + head) * 2 * half;
            const number *c = cosines + token * 2 * half, *s = sines + token * 2 * half;
            for (size i = 0; i < half; i += LANES) {
                size n = half - i;
                floats first = load(x + begin + i, n), second = load(x + begin + half + i, n);
                floats at = load((sign < 0 ? s + half : s) + i, n), after = load((sign < 0 ? s : s + half) + i, n);
                store(y + begin + i, first * load(c + i, n) - sign * second * at, n);
                store(y + begin + half + i, second * load(c + half + i, n) + sign * first * after, n);
            }
        }
}

/* Dropout ------------------------------------------------------------------------------------------------------- */

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

/* An element stays where its 16 bits are not below `bar`. */
void drop(const number *x, number *y, int64_t seed, size bar, float scale, size count)
{
    uint64_t key = mixed(seed);
#pragma omp parallel for schedule(static)
    for (size i = 0; i < count; i += 2 * LANES) {
        words bits = scattered((uint32_t)(i / 2), (uint32_t)key, (uint32_t)(key >> 32) ^ (uint32_t)(i >> 33));
        size n = count - i;
        store(y + i, choose((bits & 0xffff) >= (uint32_t)bar, load(x + i, n) * scale, all(0)), n);
        if (n > LANES)
            store(y + i + LANES, choose((bits >> 16) >= (uint32_t)bar, load(x + i + LANES, n - LANES) * scale, all(0)), n - LANES);
    }
}

/* Attention ----------------------------------------------------------------------------------------------------- */

/* Matrices are multiplied in units of 32 bits: two numbers next to each other along what is summed over, where the
   processor multiplies such pairs, otherwise one in fp32. */
#if BITS == 16 && defined(__AVX512BF16__)
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
INLINE void put(unit *row, size at, floats x) /* 16 numbers of a row, which are summed over along the row */
{
    numbers y = narrow(x);
    memcpy((number *)row + at, &y, sizeof y);
}
#else
enum { PAIR = 1 };
typedef float unit;
typedef floats units;
INLINE floats add_product(floats sums, unit one, units many) { return sums + one * many; }
INLINE units paired(floats a, floats b) { return a; }
INLINE void put(unit *row, size at, floats x) { memcpy(row + at, &x, sizeof x); }
#endif

enum { QUERIES = 32, ROWS = 4, VECTORS = 4 };

INLINE void tile(const unit *a, size down, size right, const unit *b, size width, float *c, size stride, size rows, size inner,
                 int vectors, int add)
{
    floats sums[ROWS][VECTORS];
    const unit *from[ROWS];
    EACH(r, ROWS) /* where there are fewer rows, the first stands in for the others */
    {
        from[r] = a + (r < rows ? r : 0) * down;
        EACH(v, VECTORS) if (v < vectors)
            sums[r][v] = add ? load_floats(c + (r < rows ? r : 0) * stride + v * LANES, LANES) : all(0);
    }
    for (size k = 0; k < inner; k++) {
        units many[VECTORS];
        EACH(v, VECTORS) if (v < vectors) memcpy(&many[v], b + k * width + v * LANES, sizeof many[v]);
        EACH(r, ROWS)
            EACH(v, VECTORS) if (v < vectors) sums[r][v] = add_product(sums[r][v], from[r][k * right], many[v]);
    }
    EACH(r, ROWS)
        EACH(v, VECTORS) if (v < vectors && r < rows) store_floats(c + r * stride + v * LANES, sums[r][v], LANES);
}

/* c = a·b, or c += a·b: a(r, k) is at a[r·down + k·right], a row of b has `width` units, and one of c `stride` numbers. */
static void multiply(const unit *a, size down, size right, const unit *b, size width, float *c, size stride, size rows,
                     size columns, size inner, int add)
{
    for (size n = 0; n < columns; n += VECTORS * LANES)
        for (size r = 0; r < rows; r += ROWS) {
            const unit *from = a + r * down, *with = b + n;
            float *to = c + r * stride + n;
            size left = rows - r, vectors = (columns - n) / LANES;
            if (vectors >= 4) tile(from, down, right, with, width, to, stride, left, inner, 4, add);
            else if (vectors == 3) tile(from, down, right, with, width, to, stride, left, inner, 3, add);
            else if (vectors == 2) tile(from, down, right, with, width, to, stride, left, inner, 2, add);
            else tile(from, down, right, with, width, to, stride, left, inner, 1, add);
        }
}

static inline size filled(size n) { return (n + LANES - 1) / LANES * LANES; } /* up to whole registers */

/* Rows of `width` numbers as units along the rows, filled up with zeros. */
INLINE void along_rows(unit *to, const number *x, size stride, size count, size width)
{
    for (size r = 0; r < count; r++)
        for (size i = 0; i < width; i += LANES) put(to + r * filled(width) / PAIR, i, load(x + r * stride + i, width - i));
}

/* The same turned: for each unit along a row those of all rows, filled up with zeros. */
INLINE void turned(unit *to, const number *x, size stride, size count, size width)
{
    size across = filled(width) / PAIR;
    unit some[LANES * across];
    for (size r = 0; r < count; r += LANES) {
        size now = count - r < LANES ? count - r : LANES;
        memset(some, 0, sizeof some);
        along_rows(some, x + r * stride, stride, now, width);
        for (size k = 0; k < across; k++) {
            units column;
            EACH(half, 2) EACH(lane, 8) column[half * 8 + lane] = some[(half * 8 + lane) * across + k];
            memcpy(to + k * filled(count) + r, &column, sizeof column);
        }
    }
}

/* Rows of numbers as units down the columns, as many rows as fill registers; what is missing is zero. */
INLINE void down_columns(unit *to, const number *x, size stride, size count, size width)
{
    for (size r = 0; r < filled(count); r += PAIR)
        for (size i = 0; i < width; i += LANES) {
            floats one = r < count ? load(x + r * stride + i, width - i) : all(0);
            units both = paired(one, r + 1 < count ? load(x + (r + 1) * stride + i, width - i) : all(0));
            memcpy(to + r / PAIR * filled(width) + i, &both, sizeof both);
        }
}

/* The same of rows in fp32, of which columns `from` to `until` are meant. */
INLINE void down_scores(unit *to, const float *x, size stride, size count, size from, size until)
{
    for (size r = 0; r < count; r += PAIR)
        for (size i = from; i < until; i += LANES) {
            floats next = r + 1 < count ? load_floats(x + (r + 1) * stride + i, LANES) : all(0);
            units both = paired(load_floats(x + r * stride + i, LANES), next);
            memcpy(to + r / PAIR * stride + i, &both, sizeof both);
        }
}

/* Texts side by side, or (with bounds) one after another in one row, of which the longest has so many tokens. Where a
   text, a head and a token begin is told by strides; bias is found by text, group, member of the group and query. */
struct job {
    size texts, heads, groups, queries, tokens, width, causal, window, q[3], k[3], v[3], bias[4], seed, bar;
};

/* One text and one group of heads. */
struct task {
    size text, group, begin, queries, tokens;
    const number *k, *v;
};

static struct task task_of(const struct job *job, const int32_t *bounds, const number *k, const number *v, size index)
{
    struct task task = {index / job->groups, index % job->groups, 0, job->queries, job->tokens};
    if (bounds) {
        task.begin = bounds[task.text];
        task.queries = task.tokens = bounds[task.text + 1] - bounds[task.text];
    }
    size text = bounds ? 0 : task.text;
    task.k = k + text * job->k[0] + task.group * job->k[1] + task.begin * job->k[2];
    task.v = v + text * job->v[0] + task.group * job->v[1] + task.begin * job->v[2];
    return task;
}

/* Some queries of one head. */
struct block {
    size query, count; /* the first of them, and how many */
    size head, row;    /* the head, and the row of the first query among all texts' */
    size from, until;  /* the keys that any of them sees, in whole registers */
    const number *q, *bias;
};

static struct block block_of(const struct job *job, const struct task *task, int packed, const number *q, const number *bias,
                             size member, size query)
{
    struct block block = {query, task->queries - query < QUERIES ? task->queries - query : QUERIES};
    block.head = task->group * (job->heads / job->groups) + member;
    block.row = (packed ? task->begin : task->text * job->queries) + query;
    block.from = job->window && query >= job->window ? (query - job->window + 1) / LANES * LANES : 0;
    block.until = filled(job->causal ? query + block.count : task->tokens);
    block.q = q + (packed ? 0 : task->text * job->q[0]) + block.head * job->q[1] + (task->begin + query) * job->q[2];
    if (bias)
        block.bias = bias + task->text * job->bias[0] + task->group * job->bias[1] + member * job->bias[2] + query * job->bias[3];
    return block;
}

/* Scores of 16 keys for query `r` of a block, in fp32; minus infinity for those that it does not see. */
INLINE floats score(const struct job *job, const struct task *task, const struct block *block, const float *scores, size r,
                    size key, float scaling)
{
    ints place = (int)key + (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    size high = job->causal ? block->query + r + 1 : task->tokens;
    size low = job->window ? block->query + r + 1 - job->window : 0;
    floats z = load_floats(scores + key, LANES) * scaling;
    if (block->bias) z += load(block->bias + r * job->bias[3] + key, task->tokens - key);
    return choose((place < (int)high) & (place >= (int)low), z, all(-INFINITY));
}

/* What 16 weights of query `r` are multiplied by in dropout. */
INLINE floats stays(const struct job *job, const struct block *block, size r, size key, float scale)
{
    uint64_t seed = mixed(job->seed), at = ((block->row + r) * job->heads + block->head) * filled(job->tokens) + key;
    words bits = scattered((uint32_t)at, (uint32_t)seed, (uint32_t)(seed >> 32) ^ (uint32_t)(at >> 32));
    return choose((ints)(bits >> 16) >= (int)job->bar, all(scale), all(0));
}

/* Room for so many units, from what a thread has. */
static inline void *take(char **room, size count)
{
    void *here = *room;
    *room += filled(count) * sizeof(unit);
    return here;
}

/* Of each query `tops` has the highest score and 1 / the sum of the others' exponentials below it. Dropout leaves a weight
   with `scale`, which is 0 where there is none. */
void attention(const number *q, const number *k, const number *v, const number *bias, const int32_t *bounds,
               const struct job *job, float scaling, float scale, number *y, float *tops, char *memory, size each, size threads)
{
    size wide = filled(job->tokens), width = filled(job->width);
#pragma omp parallel num_threads(threads)
    {
        char *room = memory + omp_get_thread_num() * each;
        unit *keys = take(&room, width * wide), *values = take(&room, wide * width);
        unit *asked = take(&room, QUERIES * width), *weights = take(&room, QUERIES * wide);
        float *scores = take(&room, QUERIES * wide), *sums = take(&room, QUERIES * width);
#pragma omp for schedule(dynamic)
        for (size index = 0; index < job->texts * job->groups; index++) {
            struct task task = task_of(job, bounds, k, v, index);
            size across = filled(task.tokens);
            turned(keys, task.k, job->k[2], task.tokens, job->width);
            down_columns(values, task.v, job->v[2], task.tokens, job->width);
            for (size member = 0; member < job->heads / job->groups; member++)
                for (size query = 0; query < task.queries; query += QUERIES) {
                    struct block block = block_of(job, &task, !!bounds, q, bias, member, query);
                    size from = block.from, until = block.until;
                    along_rows(asked, block.q, job->q[2], block.count, job->width);
                    multiply(asked, width / PAIR, 1, keys + from, across, scores + from, across, block.count, until - from,
                             width / PAIR, 0);
                    for (size r = 0; r < block.count; r++) {
                        float *here = scores + r * across, *top = tops + 2 * ((block.row + r) * job->heads + block.head);
                        floats most = all(-INFINITY), all_of_them = {0};
                        for (size key = from; key < until; key += LANES) {
                            floats z = score(job, &task, &block, here, r, key, scaling);
                            store_floats(here + key, z, LANES);
                            most = choose(z > most, z, most);
                        }
                        top[0] = highest(most);
                        for (size key = from; key < until; key += LANES) {
                            floats weight = exponential(load_floats(here + key, LANES) - top[0]);
                            all_of_them += weight;
                            if (scale) weight *= stays(job, &block, r, key, scale);
                            put(weights + r * across / PAIR, key, weight);
                        }
                        top[1] = 1 / total(all_of_them);
                    }
                    multiply(weights + from / PAIR, across / PAIR, 1, values + from / PAIR * width, width, sums, width,
                             block.count, width, (until - from) / PAIR, 0);
                    for (size r = 0; r < block.count; r++) {
                        size place = (block.row + r) * job->heads + block.head;
                        for (size i = 0; i < job->width; i += LANES)
                            store(y + place * job->width + i, load_floats(sums + r * width + i, LANES) * tops[2 * place + 1],
                                  job->width - i);
                    }
                }
        }
    }
}

/* Rows of fp32, of `filled(width)` numbers each, as rows of numbers that lie `stride` apart. */
static void round_rows(const float *from, number *to, size stride, size count, size width)
{
    for (size r = 0; r < count; r++)
        for (size i = 0; i < width; i += LANES)
            store(to + r * stride + i, load_floats(from + r * filled(width) + i, LANES), width - i);
}

/* With weights w = softmax of the scores s:   ds = w · (dw − Σ w·dw),  and from it dq, dk, dv. */
void attention_backward(const number *q, const number *k, const number *v, const number *bias, const int32_t *bounds,
                        const struct job *job, float scaling, float scale, const number *dy, const float *tops, number *dq,
                        number *dk, number *dv, char *memory, size each, size threads)
{
    size wide = filled(job->tokens), width = filled(job->width);
#pragma omp parallel num_threads(threads)
    {
        char *room = memory + omp_get_thread_num() * each;
        unit *keys = take(&room, width * wide), *values = take(&room, width * wide), *own_keys = take(&room, wide * width);
        unit *asked = take(&room, QUERIES * width), *given = take(&room, QUERIES * width);
        unit *asked_down = take(&room, QUERIES * width), *given_down = take(&room, QUERIES * width);
        float *weights = take(&room, QUERIES * wide), *slopes = take(&room, QUERIES * wide);
        unit *slopes_along = take(&room, QUERIES * wide), *slopes_down = take(&room, QUERIES * wide);
        unit *weights_down = take(&room, QUERIES * wide);
        float *to_query = take(&room, QUERIES * width), *to_keys = take(&room, wide * width), *to_values = take(&room, wide * width);
#pragma omp for schedule(dynamic)
        for (size index = 0; index < job->texts * job->groups; index++) {
            struct task task = task_of(job, bounds, k, v, index);
            size across = filled(task.tokens);
            turned(keys, task.k, job->k[2], task.tokens, job->width);
            turned(values, task.v, job->v[2], task.tokens, job->width);
            down_columns(own_keys, task.k, job->k[2], task.tokens, job->width);
            memset(to_keys, 0, across * width * sizeof *to_keys);
            memset(to_values, 0, across * width * sizeof *to_values);
            for (size member = 0; member < job->heads / job->groups; member++)
                for (size query = 0; query < task.queries; query += QUERIES) {
                    struct block block = block_of(job, &task, !!bounds, q, bias, member, query);
                    size from = block.from, until = block.until, count = block.count, each_row = job->heads * job->width;
                    size pairs = (count + PAIR - 1) / PAIR, inner = width / PAIR;
                    const number *output = dy + block.row * each_row + block.head * job->width;
                    along_rows(asked, block.q, job->q[2], count, job->width);
                    along_rows(given, output, each_row, count, job->width);
                    down_columns(asked_down, block.q, job->q[2], count, job->width);
                    down_columns(given_down, output, each_row, count, job->width);
                    multiply(asked, inner, 1, keys + from, across, weights + from, across, count, until - from, inner, 0);
                    multiply(given, inner, 1, values + from, across, slopes + from, across, count, until - from, inner, 0);
                    for (size r = 0; r < count; r++) {
                        float *w = weights + r * across, *slope = slopes + r * across;
                        const float *top = tops + 2 * ((block.row + r) * job->heads + block.head);
                        floats products = {0};
                        for (size key = from; key < until; key += LANES) {
                            floats z = score(job, &task, &block, w, r, key, scaling), weight = exponential(z - top[0]) * top[1];
                            floats now = load_floats(slope + key, LANES);
                            if (scale) now *= stays(job, &block, r, key, scale);
                            store_floats(w + key, weight, LANES);
                            store_floats(slope + key, now, LANES);
                            products += weight * now;
                        }
                        float shared = total(products);
                        for (size key = from; key < until; key += LANES) {
                            floats weight = load_floats(w + key, LANES);
                            floats now = weight * (load_floats(slope + key, LANES) - shared) * scaling;
                            store_floats(slope + key, now, LANES);
                            put(slopes_along + r * across / PAIR, key, now);
                            if (scale) store_floats(w + key, weight * stays(job, &block, r, key, scale), LANES);
                        }
                    }
                    down_scores(slopes_down, slopes, across, count, from, until);
                    down_scores(weights_down, weights, across, count, from, until);
                    multiply(slopes_along + from / PAIR, across / PAIR, 1, own_keys + from / PAIR * width, width, to_query, width,
                             count, width, (until - from) / PAIR, 0);
                    round_rows(to_query, dq + block.row * each_row + block.head * job->width, each_row, count, job->width);
                    multiply(slopes_down + from, 1, across, asked_down, width, to_keys + from * width, width, until - from, width,
                             pairs, 1);
                    multiply(weights_down + from, 1, across, given_down, width, to_values + from * width, width, until - from,
                             width, pairs, 1);
                }
            size place = ((bounds ? task.begin : task.text * job->tokens) * job->groups + task.group) * job->width;
            round_rows(to_keys, dk + place, job->groups * job->width, task.tokens, job->width);
            round_rows(to_values, dv + place, job->groups * job->width, task.tokens, job->width);
        }
    }
}

/* Low-rank updates ---------------------------------------------------------------------------------------------- */

/* The factors are few rows of fp32 each, (rank, width). What a token has between them, h, takes `padded` numbers:
   the rank rounded up to whole groups, of which the last may have numbers that nobody reads. */
enum { TOKENS = 4, RANKS = 8, SOME = 32 };
static inline size padded(size rank) { return (rank + RANKS - 1) / RANKS * RANKS; }

/* Of every `group` numbers of a, then of b, half as many: the sums of those that are half a group apart. */
INLINE floats fold(floats a, floats b, int group)
{
    ints place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int half = group / 2;
    ints from = place / half * group + place % half;
    return __builtin_shuffle(a, b, from) + __builtin_shuffle(a, b, from + half);
}

INLINE void inner_step(floats sums[2 * RANKS], const number *one, const number *two, const float *const rows[RANKS], size i,
                       size n)
{
    floats first = load(one + i, n), second = load(two + i, n);
    EACH(k, RANKS)
    {
        floats row = load_floats(rows[k] + i, n);
        sums[k] += first * row;
        sums[RANKS + k] += second * row;
    }
}

/* h = x·Fᵀ for rows of x (tokens, width). */
static void inner(const number *x, const float *factor, float *h, size tokens, size width, size rank)
{
    for (size token = 0; token < tokens; token += 2)
        for (size group = 0; group < rank; group += RANKS) {
            size other = token + 1 < tokens ? token + 1 : token;
            const float *rows[RANKS];
            for (size k = 0; k < RANKS; k++) rows[k] = factor + (group + k < rank ? group + k : rank - 1) * width;
            floats sums[2 * RANKS] = {0};
            size i = 0;
            for (; i + LANES <= width; i += LANES) inner_step(sums, x + token * width, x + other * width, rows, i, LANES);
            if (i < width) inner_step(sums, x + token * width, x + other * width, rows, i, width - i);
            EACH(k, 8) sums[k] = fold(sums[2 * k], sums[2 * k + 1], 16);
            EACH(k, 4) sums[k] = fold(sums[2 * k], sums[2 * k + 1], 8);
            EACH(k, 2) sums[k] = fold(sums[2 * k], sums[2 * k + 1], 4);
            float both[2 * RANKS];
            store_floats(both, fold(sums[0], sums[1], 2), 2 * RANKS);
            memcpy(h + token * padded(rank) + group, both, RANKS * sizeof *both);
            if (other > token) memcpy(h + other * padded(rank) + group, both + RANKS, RANKS * sizeof *both);
        }
}

INLINE void outer_step(const float *h, const float *factor, const number *bias, number *y, size tokens, size width, size rank,
                       size i, int vectors, size n)
{
    floats sums[TOKENS][2];
    number *rows[TOKENS];
    const float *own[TOKENS];
    EACH(t, TOKENS) /* where there are fewer tokens, the first stands in for the others */
    {
        rows[t] = y + (t < tokens ? t : 0) * width + i;
        own[t] = h + (t < tokens ? t : 0) * padded(rank);
        EACH(v, 2) if (v < vectors) sums[t][v] = bias ? load(bias + i + v * LANES, n) : all(0);
    }
    for (size k = 0; k < rank; k++)
        EACH(v, 2) if (v < vectors)
        {
            floats row = load_floats(factor + k * width + i + v * LANES, n);
            EACH(t, TOKENS) sums[t][v] += own[t][k] * row;
        }
    EACH(t, TOKENS)
        EACH(v, 2) if (v < vectors && t < tokens) store(rows[t] + v * LANES, sums[t][v], n);
}

/* y = h·F + b for at most four rows of y (tokens, width). */
static void outer(const float *h, const float *factor, const number *bias, number *y, size tokens, size width, size rank)
{
    size i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) outer_step(h, factor, bias, y, tokens, width, rank, i, 2, LANES);
    for (; i < width; i += LANES)
        outer_step(h, factor, bias, y, tokens, width, rank, i, 1, width - i < LANES ? width - i : LANES);
}

INLINE void gradient_step(const number *x, const float *h, float *gradient, size tokens, size width, size rank, size i,
                          int vectors, size n)
{
    for (size group = 0; group < rank; group += RANKS) {
        floats sums[RANKS][2] = {0};
        for (size t = 0; t < tokens; t++)
            EACH(v, 2) if (v < vectors)
            {
                floats now = load(x + t * width + i + v * LANES, n);
                EACH(k, RANKS) sums[k][v] += h[t * padded(rank) + group + k] * now;
            }
        EACH(k, RANKS)
            EACH(v, 2) if (v < vectors && group + k < rank)
            {
                float *to = gradient + (group + k) * width + i + v * LANES;
                store_floats(to, load_floats(to, n) + sums[k][v], n);
            }
    }
}

/* gradient += hᵀ·x for rows of x (tokens, width), which a cache holds. */
static void gradients(const number *x, const float *h, float *gradient, size tokens, size width, size rank)
{
    size i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) gradient_step(x, h, gradient, tokens, width, rank, i, 2, LANES);
    for (; i < width; i += LANES)
        gradient_step(x, h, gradient, tokens, width, rank, i, 1, width - i < LANES ? width - i : LANES);
}

/* scale · the sums of all threads, which lie `each` numbers apart; within their parallel region. */
static void add_up(const float *sums, size each, float *to, size count, float scale)
{
    size threads = omp_get_num_threads();
#pragma omp for schedule(static) nowait
    for (size i = 0; i < count; i++) {
        float sum = sums[i];
        for (size thread = 1; thread < threads; thread++) sum += sums[thread * each + i];
        to[i] = scale * sum;
    }
}

void low_rank(const number *x, const float *A, const float *B, const number *bias, float scale, number *y, float *h,
              float *scaled, size tokens, size width, size out, size rank)
{
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (size o = 0; o < out; o++)
            for (size k = 0; k < rank; k++) scaled[k * out + o] = scale * B[o * rank + k];
#pragma omp for schedule(static)
        for (size t = 0; t < tokens; t += TOKENS) {
            size now = tokens - t < TOKENS ? tokens - t : TOKENS;
            inner(x + t * width, A, h + t * padded(rank), now, width, rank);
            outer(h + t * padded(rank), scaled, bias, y + t * out, now, out, rank);
        }
    }
}

/* Every thread has sums of its own, (rank, width) and (rank, out), which are added up in the end. */
void low_rank_backward(const number *x, const float *h, const number *dy, const float *A, const float *scaled, float scale,
                       number *dx, float *sums, float *dA, float *dB, size tokens, size width, size out, size rank,
                       size threads)
{
    size each = rank * (width + out);
#pragma omp parallel num_threads(threads)
    {
        float *own = sums + omp_get_thread_num() * each, dh[SOME * padded(rank)];
        memset(own, 0, each * sizeof *own);
#pragma omp for schedule(static)
        for (size from = 0; from < tokens; from += SOME) {
            size some = tokens - from < SOME ? tokens - from : SOME;
            for (size t = 0; t < some; t += TOKENS) {
                size now = some - t < TOKENS ? some - t : TOKENS;
                inner(dy + (from + t) * out, scaled, dh + t * padded(rank), now, out, rank);
                outer(dh + t * padded(rank), A, NULL, dx + (from + t) * width, now, width, rank);
            }
            gradients(x + from * width, dh, own, some, width, rank);
            gradients(dy + from * out, h + from * padded(rank), own + rank * width, some, out, rank);
        }
        add_up(sums, each, dA, rank * width, 1);
        add_up(sums + rank * width, each, dB, rank * out, scale);
    }
}

/* Magnitudes ---------------------------------------------------------------------------------------------------- */

void scale_columns(const number *x, const float *factors, const float *bias, number *y, size rows, size width)
{
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++)
        for (size i = 0; i < width; i += LANES) {
            size n = width - i;
            floats scaled = load(x + row * width + i, n) * load_floats(factors + i, n);
            store(y + row * width + i, bias ? scaled + load_floats(bias + i, n) : scaled, n);
        }
}

/* Every thread has sums of its own, (width), which are added up in the end. */
void scale_columns_backward(const number *x, const float *factors, const number *dy, number *dx, float *sums,
                            float *products, size rows, size width, size threads)
{
#pragma omp parallel num_threads(threads)
    {
        float *own = sums + omp_get_thread_num() * width;
        memset(own, 0, width * sizeof *own);
#pragma omp for schedule(static)
        for (size from = 0; from < rows; from += TOKENS) {
            size some = rows - from < TOKENS ? rows - from : TOKENS;
            for (size i = 0; i < width; i += LANES) {
                size n = width - i;
                floats factor = load_floats(factors + i, n), sum = load_floats(own + i, n);
                for (size row = from; row < from + some; row++) {
                    floats now = load(dy + row * width + i, n);
                    sum += now * load(x + row * width + i, n);
                    store(dx + row * width + i, now * factor, n);
                }
                store_floats(own + i, sum, n);
            }
        }
        add_up(sums, width, products, width, 1);
    }
}

/* Weights in fewer bits ----------------------------------------------------------------------------------------- */

/* Rounded before anything is added to it: inlined, a compiler would make one operation of both. */
static __attribute__((noinline)) float product(float a, float b) { return a * b; }

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
    if (bits == 8) {
#if AVX512
        return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
#else
        float read[LANES];
        for (int i = 0; i < LANES; i++) read[i] = ((const int8_t *)codes)[i];
        return load_floats(read, LANES);
#endif
    }
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

/* The numbers from place `start` on, where a block begins. Scales are fp32, or (with `coarse`) codes of 8 bits. */
void decode(const uint8_t *codes, const void *scales, const float *coarse, const float *offset, const float *map,
            const float *levels, number *out, size start, size count, size block, size bits)
{
    floats level = levels ? load_floats(levels, 1 << bits) : all(0);
#pragma omp parallel for schedule(static)
    for (size from = 0; from < count; from += block) {
        size some = count - from < block ? count - from : block, place = (start + from) / block;
        float scale = coarse ? product(map[((const uint8_t *)scales)[place]], coarse[place / 256]) + *offset
                             : ((const float *)scales)[place];
        const uint8_t *own = codes + (start + from) * bits / 8;
        if (bits == 8) decode_block(own, level, scale / 127, out + from, some, 8);
        else if (bits == 4) decode_block(own, level, scale, out + from, some, 4);
        else if (bits == 3) decode_block(own, level, scale, out + from, some, 3);
        else decode_block(own, level, scale, out + from, some, 2);
    }
}

/* Loss ---------------------------------------------------------------------------------------------------------- */

void cross_entropy(number *logits, const int64_t *targets, float share, float *losses, size rows, size classes)
{
#pragma omp parallel for schedule(static)
    for (size row = 0; row < rows; row++) {
        number *z = logits + row * classes;
        floats most = all(-INFINITY), sums = {0};
        for (size i = 0; i < classes; i += LANES) {
            floats now = first(classes - i, load(z + i, classes - i), -INFINITY);
            most = choose(now > most, now, most);
        }
        float top = highest(most), right = load(z + targets[row], 1)[0];
        for (size i = 0; i < classes; i += LANES)
            sums += exponential(first(classes - i, load(z + i, classes - i), -INFINITY) - top);
        float sum = total(sums);
        losses[row] = logf(sum) + top - right;
        float factor = share / sum;
        for (size i = 0; i < classes; i += LANES)
            store(z + i, exponential(load(z + i, classes - i) - top) * factor, classes - i);
        store(z + targets[row], all(expf(right - top) * factor - share), 1);
    }
}

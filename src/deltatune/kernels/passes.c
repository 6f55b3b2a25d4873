/* What a training step does between its matrix products: each loop here reads its inputs once, computes in fp32 and
   writes its outputs once. PyTorch makes several passes of each, with what lies between them in memory.

   Numbers have BITS bits: 16 (bf16) or 32 (fp32). Every matrix is dense and row-major. Threads share the rows, always
   in the same way, and what several have summed is added in their order: the same inputs on as many threads give the
   same bits. The vectors are those of GCC and Clang: 16 numbers, in as many registers as the processor needs. What each
   function computes stands beside its operator in passes.py. */

#include "codes.h"

const int32_t wide_registers = AVX512;

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

/* GELU is x·Φ(x) with Φ(x) = 1/2 + x·P(x²), and its derivative the like, where x is within ±4.5: exact, and as tanh gives it.
   Ten terms that are at most 3e-5 off for Φ and 2e-4 for derivatives (the least of the largest, by Lawson's iteration, but that
   Φ is past 0 and 1 where it ends), less than the last bit of bf16 holds. */
enum { TERMS = 10 };
static const float Phi[2][TERMS] = {
    {3.98924671e-01f, -6.64206781e-02f, 9.89177189e-03f, -1.14271426e-03f, 1.01733847e-04f, -6.81369593e-06f, 3.27889615e-07f,
     -1.05669719e-08f, 2.02240554e-10f, -1.72628136e-12f},
    {3.98920858e-01f, -6.67416575e-02f, 1.01207351e-02f, -1.20790801e-03f, 1.11951838e-04f, -7.79456230e-06f, 3.87266214e-07f,
     -1.27835956e-08f, 2.48903339e-10f, -2.15032632e-12f},
};
static const float slopes[2][TERMS] = {
    {7.97626131e-01f, -2.64925647e-01f, 5.86092778e-02f, -8.81584983e-03f, 9.40540117e-04f, -7.12217376e-05f, 3.72191750e-06f,
     -1.26804510e-07f, 2.52129576e-09f, -2.21077626e-11f},
    {7.97544565e-01f, -2.65975652e-01f, 5.97634059e-02f, -9.24343343e-03f, 1.02097803e-03f, -8.00458805e-05f, 4.31273692e-06f,
     -1.50650300e-07f, 3.05519926e-09f, -2.72063521e-11f},
};

INLINE floats half_and_odd(floats x, const float terms[TERMS])
{
    x = within(x, -4.5f, 4.5f);
    floats square = x * x, sum = all(terms[TERMS - 1]);
    for (int i = TERMS - 2; i >= 0; i--) sum = sum * square + terms[i];
    return sum * x + 0.5f;
}

void gelu(const number *x, number *y, size tanh, size count)
{
#pragma omp parallel for schedule(static)
    for (size i = 0; i < count; i += LANES) {
        floats now = load(x + i, count - i);
        store(y + i, now * within(half_and_odd(now, Phi[tanh]), 0, 1), count - i);
    }
}

void gelu_backward(const number *x, const number *dy, number *dx, size tanh, size count)
{
#pragma omp parallel for schedule(static)
    for (size i = 0; i < count; i += LANES) {
        floats slope = half_and_odd(load(x + i, count - i), slopes[tanh]);
        store(dx + i, load(dy + i, count - i) * slope, count - i);
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

/* Weights in fewer bits ----------------------------------------------------------------------------------------- */

/* The numbers from place `start` on, where a block begins. */
void decode(const uint8_t *codes, const void *scales, const float *coarse, const float *offset, const float *map,
            const float *levels, number *out, size start, size count, size block, size bits)
{
    struct codes of = {codes, scales, coarse, offset, map, levels, block, bits};
#pragma omp parallel for schedule(static)
    for (size from = 0; from < count; from += block)
        decode_part(&of, start + from, count - from < block ? count - from : block, out + from);
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

/* The thin products of low-rank updates, and magnitudes of columns. */

#include "matrix_units.h"

/* Low-rank updates ---------------------------------------------------------------------------------------------- */

/* The factors are few rows of fp32 each, (rank, width). What a token has between them, h, takes `padded` numbers:
   the rank rounded up to whole groups, of which the last may have numbers that nobody reads. */
enum { TOKENS = 4, FEW = 8, RANKS = 8, SOME = 32 };
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

/* In matrix units ------------------------------------------------------------------------------------------------ */

/* A number of fp32 is the sum of three of bf16: what it is rounded to, what the rest is, and what is left of that. So a factor
   has three times as many rows (the first part of each rank, the second of each, the third), in tiles of 16. Of widths whole
   tiles alone are taken. Sums are kept in tiles, too, in pairs for 32 columns, which the instructions that bring rows of x
   together leave in another order. */
enum { MANY = 2 * SOME, MOST = 64, TILE = LANES * LANES };
static inline size tiles_of(size rank) { return (3 * padded(rank) + LANES - 1) / LANES; }
#if UNITS
static int in_units(size width, size rank) { return matrix_units && width % DUO == 0 && rank <= MOST; }

INLINE floats part_of(floats x, size part)
{
    if (part > 0) x -= rounded(x);
    if (part > 1) x -= rounded(x);
    return x;
}

/* A factor as columns, tile by tile; shared by the threads of a region. */
static void pack_factor(const float *factor, unit *to, size rank, size width)
{
    size across = width / DUO;
#pragma omp for schedule(static)
    for (size tile = 0; tile < tiles_of(rank) * across; tile++) {
        _Alignas(64) unit rows[TILE];
        for (size r = 0; r < LANES; r++) {
            size row = tile / across * LANES + r, k = row % padded(rank), part = row / padded(rank);
            const float *from = part < 3 && k < rank ? factor + k * width + tile % across * DUO : NULL;
            EACH(v, 2) put(rows + r * LANES, v * LANES, from ? part_of(load_floats(from + v * LANES, LANES), part) : all(0));
        }
        transpose(rows, LANES, to + tile * TILE, LANES);
    }
}

/* `inner`, for at most SOME rows of x; of those that are missing the first stands in. */
static void inner_of_some(const number *x, const unit *factor, float *h, size tokens, size width, size rank)
{
    _Alignas(64) number room[SOME * DUO];
    _Alignas(64) float sums[SOME * (3 * MOST + DUO)];
    size stride = tiles_of(rank) * LANES, one = width / DUO * TILE;
    for (size n = 0; n < tiles_of(rank); n++) {
        const unit *tiles = factor + n * one;
        _tile_zero(0);
        _tile_zero(1);
        for (size i = 0; i < width; i += DUO, tiles += TILE) {
            const number *from = x + i;
            size each = width;
            if (tokens < SOME) {
                EACH(r, SOME) memcpy(room + r * DUO, x + (r < tokens ? r : 0) * width + i, DUO * sizeof *x);
                from = room, each = DUO;
                SETTLED;
            }
            _tile_loadd(4, from, 2 * each);
            _tile_loadd(5, from + LANES * each, 2 * each);
            _tile_loadd(6, tiles, 4 * LANES);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, sums + n * LANES, 4 * stride);
        _tile_stored(1, sums + LANES * stride + n * LANES, 4 * stride);
    }
    SETTLED;
    for (size t = 0; t < tokens; t++)
        for (size k = 0; k < padded(rank); k += RANKS) {
            floats sum = all(0);
            EACH(part, 3) sum += load_floats(sums + t * stride + part * padded(rank) + k, RANKS);
            store_floats(h + t * padded(rank) + k, sum, RANKS);
        }
}
static void inner_in_units(const number *x, const unit *factor, float *h, size tokens, size width, size rank)
{
    for (size t = 0; t < tokens; t += SOME)
        inner_of_some(x + t * width, factor, h + t * padded(rank), tokens - t < SOME ? tokens - t : SOME, width, rank);
}

/* hᵀ of at most MANY tokens, tile by tile: so many of SOME tokens for each 16 rows. */
static void pack_columns(const float *h, unit *to, size tokens, size rank)
{
    memset(to, 0, tiles_of(rank) * MANY / SOME * TILE * sizeof *to);
    for (size t = 0; t < tokens; t += LANES)
        for (size group = 0; group < padded(rank); group += RANKS) {
            _Alignas(64) float rows[TILE];
            for (size i = 0; i < LANES; i++) {
                const float *from = h + (t + i) * padded(rank) + group;
                store_floats(rows + i * LANES, t + i < tokens ? load_floats(from, RANKS) : all(0), LANES);
            }
            transpose((const unit *)rows, LANES, (unit *)rows, LANES);
            EACH(k, RANKS) EACH(part, 3)
            {
                size row = part * padded(rank) + group + k;
                unit *tile = to + (row / LANES * MANY / SOME + t / SOME) * TILE;
                put(tile + row % LANES * LANES, t % SOME, part_of(load_floats(rows + k * LANES, LANES), part));
            }
        }
}

/* Sums in tiles += hᵀ·x for at most MANY rows of x. */
static void gradients_in_units(const number *x, const unit *h, float *sums, size tokens, size width, size rank)
{
    _Alignas(64) unit both[MANY / SOME * 2 * TILE];
    size steps = (tokens + SOME - 1) / SOME;
    for (size i = 0; i < width; i += DUO) {
        for (size t = 0; t < steps * SOME; t += 2) {
            __m512i none = _mm512_setzero_si512(), one = t < tokens ? _mm512_loadu_si512(x + t * width + i) : none;
            __m512i two = t + 1 < tokens ? _mm512_loadu_si512(x + (t + 1) * width + i) : none;
            unit *to = both + t / SOME * 2 * TILE + t % SOME / 2 * LANES;
            _mm512_store_si512(to, _mm512_unpacklo_epi16(one, two));
            _mm512_store_si512(to + TILE, _mm512_unpackhi_epi16(one, two));
        }
        SETTLED;
        for (size n = 0; n < tiles_of(rank); n++) {
            float *to = sums + (n * width / DUO + i / DUO) * 2 * TILE;
            _tile_loadd(0, to, 4 * LANES);
            _tile_loadd(1, to + TILE, 4 * LANES);
            for (size step = 0; step < steps; step++) {
                _tile_loadd(4, h + (n * MANY / SOME + step) * TILE, 4 * LANES);
                _tile_loadd(5, both + step * 2 * TILE, 4 * LANES);
                _tile_loadd(6, both + (step * 2 + 1) * TILE, 4 * LANES);
                _tile_dpbf16ps(0, 4, 5);
                _tile_dpbf16ps(1, 4, 6);
            }
            _tile_stored(0, to, 4 * LANES);
            _tile_stored(1, to + TILE, 4 * LANES);
        }
    }
    SETTLED;
}

/* Sums in tiles as rows, (rank, width). */
static void rows_of_sums(const float *sums, float *to, size rank, size width)
{
    ints order = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
    for (size k = 0; k < rank; k++)
        for (size i = 0; i < width; i += DUO) {
            floats low = all(0), high = all(0);
            EACH(part, 3)
            {
                size row = part * padded(rank) + k;
                const float *from = sums + (row / LANES * width / DUO + i / DUO) * 2 * TILE + row % LANES * LANES;
                low += load_floats(from, LANES), high += load_floats(from + TILE, LANES);
            }
            store_floats(to + k * width + i, __builtin_shuffle(low, high, order), LANES);
            store_floats(to + k * width + i + LANES, __builtin_shuffle(low, high, order + 8), LANES);
        }
}
#else
static int in_units(size width, size rank) { return 0; }
static void pack_factor(const float *factor, unit *to, size rank, size width) {}
static void inner_in_units(const number *x, const unit *factor, float *h, size tokens, size width, size rank) {}
static void pack_columns(const float *h, unit *to, size tokens, size rank) {}
static void gradients_in_units(const number *x, const unit *h, float *sums, size tokens, size width, size rank) {}
static void rows_of_sums(const float *sums, float *to, size rank, size width) {}
#endif

/* The rows from which and to which a thread of a team goes. */
struct share {
    size from, until;
};
static struct share share_of(size rows, size step)
{
    size team = omp_get_num_threads(), thread = omp_get_thread_num(), parts = (rows + step - 1) / step;
    size from = parts * thread / team * step, until = parts * (thread + 1) / team * step;
    return (struct share){from, until < rows ? until : rows};
}

/* h = x·Aᵀ, and (scale·B)ᵀ. For matrix units there is room for A. */
void low_rank(const number *x, const float *A, const float *B, float scale, float *h, float *scaled, unit *room, size tokens,
              size width, size out, size rank)
{
    int units = in_units(width, rank);
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (size o = 0; o < out; o++)
            for (size k = 0; k < rank; k++) scaled[k * out + o] = scale * B[o * rank + k];
        struct share share = share_of(tokens, LANES);
        const number *from = x + share.from * width;
        float *to = h + share.from * padded(rank);
        if (units) {
            begin_units();
            pack_factor(A, room, rank, width);
            inner_in_units(from, room, to, share.until - share.from, width, rank);
            end_units();
        } else inner(from, A, to, share.until - share.from, width, rank);
    }
}

/* y = h·F + b */
void low_rank_output(const float *h, const float *factor, const number *bias, number *y, size tokens, size width, size rank)
{
#pragma omp parallel for schedule(static)
    for (size t = 0; t < tokens; t += TOKENS)
        outer(h + t * padded(rank), factor, bias, y + t * width, tokens - t < TOKENS ? tokens - t : TOKENS, width, rank);
}

/* Magnitudes ---------------------------------------------------------------------------------------------------- */

/* What a weight W (out, width) is with W + scale·B·A: the squares of the norms of its own rows are known. */
struct updated {
    const number *weight;
    const float *A, *B, *squares;
    float *norms;
    size out, width, rank;
    double scale;
};

/* The norm of each row of such sums; `none` stands for one that is zero. */
void updated_norms(const struct updated *several, size count, float none)
{
#pragma omp parallel
    for (size i = 0; i < count; i++) {
        struct updated one = several[i];
        size rank = one.rank;
        float scale = one.scale, G[rank * rank], U[TOKENS * padded(rank)]; /* U is W·Aᵀ */
        gram(one.A, G, rank, one.width);
#pragma omp for schedule(static) nowait
        for (size o = 0; o < one.out; o += TOKENS) {
            size now = one.out - o < TOKENS ? one.out - o : TOKENS;
            inner(one.weight + o * one.width, one.A, U, now, one.width, rank);
            for (size r = 0; r < now; r++) {
                const float *b = one.B + (o + r) * rank;
                float square = one.squares[o + r];
                for (size k = 0; k < rank; k++) {
                    float own = 0;
                    for (size j = 0; j < rank; j++) own += b[j] * G[k * rank + j];
                    square += scale * b[k] * (2 * U[r * padded(rank) + k] + scale * own);
                }
                one.norms[o + r] = square > 0 ? sqrtf(square) : none;
            }
        }
    }
}

/* y = m/n · x + b for some rows. */
static void scale_some(const number *x, const float *m, const float *n, const float *bias, number *y, size rows, size width)
{
    for (size i = 0; i < width; i += LANES) {
        size some = width - i;
        floats factor = load_floats(m + i, some) / load_floats(n + i, some), plus = bias ? load_floats(bias + i, some) : all(0);
        for (size row = 0; row < rows; row++)
            store(y + row * width + i, load(x + row * width + i, some) * factor + plus, some);
    }
}

void scale_columns(const number *x, const float *m, const float *n, const float *bias, number *y, size rows, size width)
{
#pragma omp parallel for schedule(static)
    for (size from = 0; from < rows; from += FEW)
        scale_some(x + from * width, m, n, bias, y + from * width, rows - from < FEW ? rows - from : FEW, width);
}

/* The sums += Σ a ⊙ b over some rows. */
static void sum_products(const number *a, const number *b, float *sums, size rows, size width)
{
    for (size from = 0; from < rows; from += FEW) {
        size until = rows - from < FEW ? rows : from + FEW;
        for (size i = 0; i < width; i += LANES) {
            size some = width - i;
            floats sum = load_floats(sums + i, some);
            for (size row = from; row < until; row++) sum += load(a + row * width + i, some) * load(b + row * width + i, some);
            store_floats(sums + i, sum, some);
        }
    }
}

/* Every thread has sums of its own, (width), which are added up in the end. */
void scale_columns_backward(const number *x, const float *m, const float *n, const number *dy, number *dx, float *sums,
                            float *dm, size rows, size width, size threads)
{
#pragma omp parallel num_threads(threads)
    {
        float *own = sums + omp_get_thread_num() * width;
        memset(own, 0, width * sizeof *own);
#pragma omp for schedule(static)
        for (size from = 0; from < rows; from += FEW)
        {
            size some = rows - from < FEW ? rows - from : FEW;
            sum_products(x + from * width, dy + from * width, own, some, width);
            scale_some(dy + from * width, m, n, NULL, dx + from * width, some, width);
        }
        add_up(sums, width, dm, NULL, n, 1, width, 1);
    }
}

/* Low-rank updates, backward ------------------------------------------------------------------------------------ */

/* Every thread has sums of its own, (rank, width), (rank, out) and, where there is a magnitude, (out), which are added up in
   the end; dB is (out, rank). In `each` numbers there is room for sums in tiles, too, and for columns of h; behind them is
   some for a factor. Where there is an n, a magnitude is of Z, and what goes on from there is dZ; otherwise Z is what the
   magnitude gave, with `scales` for its columns, by which `scaled` is multiplied already. */
void low_rank_backward(const number *x, const float *h, const number *dy, const float *scaled, float scale, const number *Z,
                       const float *m, const float *n, const float *scales, float *dh, float *sums, size each, float *dA,
                       float *dB, number *dZ, float *dm, size tokens, size width, size out, size rank, size threads)
{
    size factors = rank * (width + out), of_x = LANES * tiles_of(rank) * width, of_y = LANES * tiles_of(rank) * out;
    int units = in_units(width, rank) && in_units(out, rank);
    unit *packed = (unit *)(sums + threads * each);
#pragma omp parallel num_threads(threads)
    {
        float *own = sums + omp_get_thread_num() * each, *tiles = own + filled(factors + (m ? out : 0));
        unit *columns = (unit *)(tiles + of_x + of_y);
        memset(own, 0, ((units ? (float *)columns : tiles) - own) * sizeof *own);
        if (units) {
            begin_units();
            pack_factor(scaled, packed, rank, out);
        }
        struct share share = share_of(tokens, SOME);
        size step = units ? MANY : SOME;
        for (size from = share.from; from < share.until; from += step) {
            size some = share.until - from < step ? share.until - from : step, place = from * out;
            const number *slopes = n ? dZ + place : dy + place;
            float *slope = dh + from * padded(rank);
            if (m) sum_products(Z + place, dy + place, own + factors, some, out);
            if (n) scale_some(dy + place, m, n, NULL, dZ + place, some, out);
            if (units) {
                inner_in_units(slopes, packed, slope, some, out, rank);
                pack_columns(slope, columns, some, rank);
                gradients_in_units(x + from * width, columns, tiles, some, width, rank);
                pack_columns(h + from * padded(rank), columns, some, rank);
                gradients_in_units(slopes, columns, tiles + of_x, some, out, rank);
            } else {
                inner(slopes, scaled, slope, some, out, rank);
                gradients(x + from * width, slope, own, some, width, rank);
                gradients(slopes, h + from * padded(rank), own + rank * width, some, out, rank);
            }
        }
        if (units) {
            rows_of_sums(tiles, own, rank, width);
            rows_of_sums(tiles + of_x, own + rank * width, rank, out);
            end_units();
        }
#pragma omp barrier
        add_up(sums, each, dA, NULL, NULL, 1, rank * width, 1);
        add_up(sums + rank * width, each, dB, scales, NULL, rank, out, scale);
        if (m) add_up(sums + factors, each, dm, NULL, n ? n : m, 1, out, 1);
    }
}

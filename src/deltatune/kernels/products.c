/* Products with frozen weights. */

#include "codes.h"
#include "matrix_units.h"

#if PAIRED
const int32_t multiplies = 1;

/* A panel is weights of as many columns of y as a tile takes, as units: those that are multiplied by the same unit of x
   stand next to each other. A tile of y stays in registers until it is done; where a row of x has more numbers than a panel
   takes, its sums are carried from one panel to the next. */
enum { WIDE = 4, PANEL = WIDE * LANES, TALL = 6, DEEP = 1 << 12, HIGH = 16, LINE = 64 / sizeof(number) };

/* Matrix units have registers of 16 rows, of 16 units of x each, or of weights, or of 16 sums. A tile is two by two of these,
   and panels are as wide; those of many columns are packed at once, a slab, so that x is read few times. */
enum { SIDE = 2 * LANES, HALF = 8, SLAB = 1 << 18, BROAD = 1 << 10, PART = 640 };

/* The weights are (out, inner), or where they are `turned` (inner, out): numbers, or where there are none codes. Where there are
   `scales`, one for each number of a row of x, they are multiplied by these. */
struct weights {
    const number *numbers;
    struct codes codes;
    size turned, inner, out;
    const float *scales;
};

/* So many weights from place `from` on; those that stand there as codes are decoded into `room`. */
INLINE const number *numbers_of(const struct weights *weights, size from, size count, number *room)
{
    if (weights->numbers) return weights->numbers + from;
    decode_part(&weights->codes, from, count, room);
    return room;
}

/* The panels of `wide` columns from n on, for `deep` numbers of a row of x from number k on. A panel has `rows` rows of
   `columns` units. */
INLINE void pack(const struct weights *weights, unit *slab, size columns, size rows, size n, size wide, size k, size deep)
{
    static _Thread_local _Alignas(64) number room[LANES * DEEP];
    size inner = weights->inner, out = weights->out;
    const float *scales = weights->scales ? weights->scales + k : NULL;
    if (weights->turned)
        for (size row = 0; row < deep / 2; row++) {
            const number *one = numbers_of(weights, (k + 2 * row) * out + n, wide, room);
            const number *two = numbers_of(weights, (k + 2 * row + 1) * out + n, wide, room + BROAD);
            for (size i = 0; i < wide; i += LANES) {
                units both = beside(one + i, two + i);
                if (scales) both = paired(load(one + i, LANES) * scales[2 * row], load(two + i, LANES) * scales[2 * row + 1]);
                memcpy(slab + i / columns * columns * rows + row * columns + i % columns, &both, sizeof both);
            }
        }
    else
        for (size i = 0; i < wide; i += LANES) {
            const number *from = weights->numbers + (n + i) * inner + k;
            unit *to = slab + i / columns * columns * rows + i % columns;
            size stride = inner;
            if (!weights->numbers || scales) {
                from = room, stride = deep;
                for (size row = 0; row < LANES; row++) {
                    number *made = room + row * deep;
                    const number *read = numbers_of(weights, (n + i + row) * inner + k, deep, made);
                    for (size j = 0; scales && j < deep; j += LANES)
                        store(made + j, load(read + j, LANES) * load_floats(scales + j, LANES), LANES);
                }
            }
            for (size row = 0; row < deep / 2; row += LANES)
                transpose((const unit *)from + row, stride / 2, to + row * columns, columns);
        }
}

/* Asks for a part of the weights of the panel from n on, so that they are near when it is packed. */
INLINE void ask_for(const struct weights *weights, size n, size part, size parts)
{
    size inner = weights->inner, from = inner * part / parts, to = inner * (part + 1) / parts;
    for (size k = from; k < to; k++) {
        const number *row = weights->numbers + (weights->turned ? k * weights->out + n : n * inner + k * PANEL);
        for (size i = 0; i < PANEL; i += LINE) _mm_prefetch((const char *)(row + i), _MM_HINT_T1);
    }
}

/* What is added to a product before it is rounded: h·F with F (rank, out), then, where there are `scales` of the columns, the
   sum multiplied by these, a bias. Each can be missing. */
struct more {
    const number *bias;
    const float *h, *factor, *scales;
    size rank, padded;
};

/* What a tile is made from and goes to. */
struct tile {
    const number *x;
    number *y;
    const float *h;
    float *carry; /* its sums: so far unless it begins with this panel, and from now on unless it ends */
    size apart;   /* from a row of them to the next */
    size rows, column, begins, ends;
};

INLINE void product_tile(const struct tile *tile, const unit *panel, size deep, size inner, size out, const struct more *more,
                         int vectors, int carries)
{
    size rows = tile->rows, column = tile->column;
    floats sums[TALL][WIDE];
    const unit *from[TALL];
    EACH(r, TALL) from[r] = (const unit *)(tile->x + (r < rows ? r : 0) * inner); /* the first stands in for missing ones */
    if (!carries || tile->begins) EACH(r, TALL) EACH(v, WIDE) sums[r][v] = all(0);
    else EACH(r, TALL) EACH(v, WIDE) sums[r][v] = load_floats(tile->carry + r * tile->apart + v * LANES, LANES);
    for (size k = 0; k < deep / 2; k++) {
        units many[WIDE];
        EACH(v, WIDE) if (v < vectors) memcpy(&many[v], panel + k * PANEL + v * LANES, sizeof many[v]);
        EACH(r, TALL)
        {
            unit one = from[r][k];
            EACH(v, WIDE) if (v < vectors) sums[r][v] = add_product(sums[r][v], one, many[v]);
        }
    }
    if (carries && !tile->ends) {
        EACH(r, TALL) EACH(v, WIDE) store_floats(tile->carry + r * tile->apart + v * LANES, sums[r][v], LANES);
        return;
    }
    for (size k = 0; k < more->rank; k++)
        EACH(v, WIDE) if (v < vectors)
        {
            floats row = load_floats(more->factor + k * out + column + v * LANES, LANES);
            EACH(r, TALL) sums[r][v] += tile->h[(r < rows ? r : 0) * more->padded + k] * row;
        }
    EACH(v, WIDE) if (v < vectors)
    {
        floats bias = more->bias ? load(more->bias + column + v * LANES, LANES) : all(0);
        if (more->scales) {
            floats scale = load_floats(more->scales + column + v * LANES, LANES);
            EACH(r, TALL) sums[r][v] *= scale;
        }
        EACH(r, TALL) if (r < rows) store(tile->y + r * out + column + v * LANES, sums[r][v] + bias, LANES);
    }
}

static void tall_tile(const struct tile *tile, const unit *panel, size wide, size deep, size inner, size out,
                      const struct more *more)
{
    switch (tile->carry ? 0 : wide / LANES) { /* one that carries has room for all */
    case 0: product_tile(tile, panel, deep, inner, out, more, wide / LANES, 1); break;
    case 1: product_tile(tile, panel, deep, inner, out, more, 1, 0); break;
    case 2: product_tile(tile, panel, deep, inner, out, more, 2, 0); break;
    case 3: product_tile(tile, panel, deep, inner, out, more, 3, 0); break;
    default: product_tile(tile, panel, deep, inner, out, more, WIDE, 0);
    }
}

#if UNITS
/* h·F beside the product, as if a row of x had more numbers: each of both is the sum of two numbers, and of their four
   products the three larger are added. */
INLINE size beside_product(size padded) { return (3 * padded + DUO - 1) / DUO * DUO; }

/* As many rows of weights for `wide` columns from n on, behind the others of each panel. */
static void pack_factor(const struct more *of, unit *slab, size rows, size n, size wide, size out, size more)
{
    for (size i = 0; i < wide; i += LANES)
        for (size row = 0; row < more / 2; row++) {
            floats both[2];
            for (size j = 0; j < 2; j++) {
                size k = (2 * row + j) % of->padded, part = (2 * row + j) / of->padded;
                both[j] = part < 3 && k < of->rank ? load_floats(of->factor + k * out + n + i, LANES) : all(0);
                if (part == 2) both[j] -= rounded(both[j]);
            }
            units made = paired(both[0], both[1]);
            memcpy(slab + i * rows + (rows - more / 2 + row) * LANES, &made, sizeof made);
        }
}

/* Where number k of a row of x is, among those that are packed, `deep` of each row. */
INLINE number *packed(number *x, size deep, size row, size k)
{
    return x + (row / LANES * deep + k / DUO * DUO) * LANES + row % LANES * DUO + k % DUO;
}

/* `deep` numbers of a tile's rows of x, and where there are `more`, what they multiply F with. */
static __attribute__((noinline)) void pack_rows(const struct tile *tile, number *to, size deep, size stride,
                                                const struct more *of, size more)
{
    for (size row = 0; row < tile->rows; row++) {
        for (size k = 0; k < deep; k += DUO)
            memcpy(packed(to, deep + more, row, k), tile->x + row * stride + k, DUO * sizeof *to);
        for (size k = 0; k < more; k += HALF) {
            floats x = all(0);
            if (k < 3 * of->padded) x = load_floats(tile->h + row * of->padded + k % of->padded, of->rank - k % of->padded);
            if (k / of->padded == 1) x -= rounded(x);
            store(packed(to, deep + more, row, deep + k), x, HALF);
        }
    }
}

/* The sums of a tile += its rows of x times two panels, `deep` numbers of each. */
INLINE void add_products(const number *x, const unit *panels, size deep, size rows, int both)
{
    for (size k = 0; k < deep; k += DUO) {
        _tile_stream_loadd(6, panels + k / 2 * LANES, 4 * LANES);
        _tile_stream_loadd(7, panels + (rows + k / 2) * LANES, 4 * LANES);
        _tile_loadd(4, x + k * LANES, 4 * LANES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, x + (deep + k) * LANES, 4 * LANES);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

INLINE void unit_tile(const struct tile *tile, const number *x, const unit *panels, size deep, size rows, size out,
                      const struct more *more, int both)
{
    _Alignas(64) float room[SIDE * SIDE];
    float *sums = tile->carry ? tile->carry : room;
    size each = tile->carry ? tile->apart : SIDE;
    if (tile->begins) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 4 * each);
        _tile_loadd(1, sums + LANES, 4 * each);
        if (both) {
            _tile_loadd(2, sums + LANES * each, 4 * each);
            _tile_loadd(3, sums + LANES * each + LANES, 4 * each);
        }
    }
    add_products(x, panels, deep, rows, both);
    _tile_stored(0, sums, 4 * each);
    _tile_stored(1, sums + LANES, 4 * each);
    if (both) {
        _tile_stored(2, sums + LANES * each, 4 * each);
        _tile_stored(3, sums + LANES * each + LANES, 4 * each);
    }
    SETTLED;
    if (!tile->ends) return;
    EACH(v, 2)
    {
        size column = tile->column + v * LANES;
        floats bias = more->bias ? load(more->bias + column, LANES) : all(0);
        floats scale = more->scales ? load_floats(more->scales + column, LANES) : all(1);
        for (size r = 0; r < tile->rows; r++)
            store(tile->y + r * out + column, load_floats(sums + r * each + v * LANES, LANES) * scale + bias, LANES);
    }
}

/* Tiles beside each other, for the same rows of x: a part of these at a time, which the first cache holds. */
static void unit_tiles(const struct tile *tile, const unit *slab, size wide, size rows, size deep, size inner, size out,
                       const struct more *more)
{
    static _Thread_local _Alignas(64) number own[SIDE * (PART + 3 * HIGH + DUO)];
    static _Thread_local _Alignas(64) float all_sums[SIDE * BROAD];
    number *x = own;
    float *sums = all_sums;
    for (size k = 0; k < deep; k += PART) {
        size now = deep - k < PART ? deep - k : PART, ends = k + now == deep;
        struct tile part = {tile->x + k, tile->y, tile->h, tile->carry, tile->apart, tile->rows < SIDE ? tile->rows : SIDE,
                            tile->column, tile->begins && k == 0, tile->ends && ends};
        size beside = part.ends ? 2 * rows - deep : 0;
        if (!tile->carry && deep > PART) part.carry = sums, part.apart = BROAD;
        pack_rows(&part, x, now, inner, more, beside);
        SETTLED;
        for (size n = 0; n < wide; n += SIDE) {
            const unit *panels = slab + k / 2 * LANES + n * rows;
            if (part.rows > LANES) unit_tile(&part, x, panels, now + beside, rows, out, more, 1);
            else unit_tile(&part, x, panels, now + beside, rows, out, more, 0);
            part.column += SIDE;
            if (part.carry) part.carry += SIDE;
        }
    }
}
#else
static size beside_product(size rank) { return 0; }
static void pack_factor(const struct more *of, unit *slab, size rows, size n, size wide, size out, size more) {}
static void unit_tiles(const struct tile *tile, const unit *slab, size wide, size rows, size deep, size inner, size out,
                       const struct more *more)
{
}
#endif

/* The tiles of some rows of x and the panels of a slab. */
static void tiles_beside(const struct tile *tile, const unit *slab, size wide, size rows, size deep, size inner, size out,
                         const struct more *more)
{
    if (matrix_units) unit_tiles(tile, slab, wide, rows, deep, inner, out, more);
    else tall_tile(tile, slab, wide, deep, inner, out, more);
}

/* Magnitudes m of the columns of a product: of what is multiplied with, V = W + Fᵀ·A, each row is divided by its norm first.
   A is (rank, inner), and the squares of the norms of W's own rows are known. Found are the scales m/n, and m/n ⊙ F. */
struct magnitude {
    const float *A, *m, *squares;
    float *scales, *factor;
    float *whole; /* 1, or 0 where a scale is zero */
};

/* The numbers of A from number k on, as those of x stand. */
static void narrowed(const float *A, number *to, size rank, size inner, size k, size deep)
{
    for (size r = 0; r < rank; r++)
        for (size i = 0; i < deep; i += LANES) store(to + r * deep + i, load_floats(A + r * inner + k + i, LANES), LANES);
}

/* The scales of `wide` columns from n on. U, whose rows are `apart`, is A·Wᵀ of these, and G is A·Aᵀ. */
static void find_scales(const struct magnitude *magnitude, const struct more *more, const float *U, size apart, const float *G,
                        size n, size wide, size out)
{
    size rank = more->rank;
    for (size i = n; i < n + wide; i += LANES) {
        floats square = load_floats(magnitude->squares + i, LANES);
        for (size k = 0; k < rank; k++) {
            floats sum = 2 * load_floats(U + k * apart + i - n, LANES);
            for (size j = 0; j < rank; j++) sum += G[k * rank + j] * load_floats(more->factor + j * out + i, LANES);
            square += sum * load_floats(more->factor + k * out + i, LANES);
        }
        floats norm = choose(square > 0, (floats)_mm512_sqrt_ps((__m512)square), all(1));
        floats scale = load_floats(magnitude->m + i, LANES) / norm;
        store_floats(magnitude->scales + i, scale, LANES);
        for (size k = 0; k < rank; k++)
            store_floats(magnitude->factor + k * out + i, scale * load_floats(more->factor + k * out + i, LANES), LANES);
        if (_mm512_cmp_ps_mask((__m512)scale, _mm512_setzero_ps(), _CMP_EQ_OQ)) *magnitude->whole = 0;
    }
}

/* Both sizes of the weights fill registers of pairs. Threads share the columns, each with panels of its own, and where there
   are not enough for all of them the rows, too; with matrix units and many tokens the rows alone. Where `inner` is more than DEEP each has room for `each` sums to carry: a
   panel of columns at least for all tokens, in whole tiles. */
static void multiply(const number *x, const struct weights *weights, const struct more *more, const struct magnitude *magnitude,
                     number *y, float *room, size each, size tokens, size threads)
{
    size inner = weights->inner, out = weights->out;
    size tall = matrix_units ? SIDE : TALL, columns = matrix_units ? LANES : PANEL;
    size beside = matrix_units ? beside_product(more->padded) : 0;
    if (magnitude) *magnitude->whole = 1;
#pragma omp parallel num_threads(threads)
    {
        static _Thread_local _Alignas(64) unit slab[SLAB];
        static _Thread_local _Alignas(64) number A[HIGH * DEEP];
        static _Thread_local _Alignas(64) float U[(HIGH + TALL) * BROAD];
        float G[HIGH * HIGH];
        size team = omp_get_num_threads(), thread = omp_get_thread_num(), across = team; /* can be fewer than asked for */
        if (matrix_units && tokens >= 2 * SIDE * team) across = 1;
        while (team % across || (across > 1 && out < across * PANEL)) across--;
        size down = team / across, parts = out / SIDE, tiles = (tokens + tall - 1) / tall;
        size begin = parts * (thread % across) / across * SIDE, end = parts * (thread % across + 1) / across * SIDE;
        size first = tiles * (thread / across) / down, last = tiles * (thread / across + 1) / down;
        float *carried = inner > DEEP ? room + thread * each : NULL;
        size step = inner > DEEP && matrix_units ? DEEP / 4 : DEEP, most = PANEL;
        if (matrix_units) {
            most = 2 * SLAB / ((inner < step ? inner : step) + beside) / SIDE * SIDE;
            if (most > BROAD) most = BROAD;
            if (carried && most > each / (tiles * tall)) most = each / (tiles * tall) / SIDE * SIDE;
        }
        if (magnitude) gram(magnitude->A, G, more->rank, inner);
        begin_units();
        for (size n = begin; n < end; n += most)
            for (size k = 0; k < inner; k += step) {
                size wide = end - n < most ? end - n : most, deep = inner - k < step ? inner - k : step;
                size ends = k + deep == inner, rows = (deep + (ends ? beside : 0)) / 2;
                pack(weights, slab, columns, rows, n, wide, k, deep);
                if (magnitude) {
                    if (n == begin || carried) narrowed(magnitude->A, A, more->rank, inner, k, deep);
                    for (size r = 0; r < more->rank; r += tall) {
                        struct tile tile = {A + r * deep, NULL, NULL, U + r * BROAD, BROAD, more->rank - r, n, k == 0, 0};
                        tiles_beside(&tile, slab, wide, rows, deep, deep, out, more);
                    }
                    if (ends) find_scales(magnitude, more, U, BROAD, G, n, wide, out);
                }
                if (beside && ends) pack_factor(more, slab, rows, n, wide, out, beside);
                for (size index = first; index < last; index++) {
                    size t = index * tall;
                    struct tile tile = {x + t * inner + k, y + t * out, more->h + t * more->padded, NULL, most, tokens - t, n,
                                        k == 0, ends};
                    if (carried) tile.carry = carried + t * most;
                    if (weights->numbers && !carried && n + most + PANEL <= end) ask_for(weights, n + most, index - first, last - first);
                    tiles_beside(&tile, slab, wide, rows, deep, inner, out, more);
                }
            }
        end_units();
    }
}

void product(const number *x, const number *numbers, size turned, const float *of_rows, const number *bias, const float *h,
             const float *factor, size rank, size padded, number *y, float *room, size each, size tokens, size inner, size out,
             size threads)
{
    struct weights weights = {.numbers = numbers, .turned = turned, .inner = inner, .out = out, .scales = of_rows};
    struct more more = {bias, h, factor, NULL, rank, padded};
    multiply(x, &weights, &more, NULL, y, room, each, tokens, threads);
}

/* Of the weight either numbers are given or codes; of a magnitude all or nothing. */
void any_product(const number *x, const number *numbers, const uint8_t *codes, const void *scales, const float *coarse,
                 const float *offset, const float *map, const float *levels, size block, size bits, size turned,
                 const float *of_rows, const float *A, const float *m, const float *squares, float *of_columns, float *scaled,
                 float *whole, const number *bias, const float *h, const float *factor, size rank, size padded, number *y,
                 float *room, size each, size tokens, size inner, size out, size threads)
{
    struct weights weights = {numbers, {codes, scales, coarse, offset, map, levels, block, bits}, turned, inner, out, of_rows};
    struct more more = {bias, h, factor, of_columns, rank, padded};
    struct magnitude magnitude = {A, m, squares, of_columns, scaled, whole};
    multiply(x, &weights, &more, m ? &magnitude : NULL, y, room, each, tokens, threads);
}
#else
const int32_t multiplies = 0;
#endif

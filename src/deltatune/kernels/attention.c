/* Attention: the weights of a few queries at a time, which are never written to memory. */

#include "matrix_units.h"

enum { QUERIES = 32, TILE = 16 };

/* Of `tall` rows and `vectors` times 16 columns, which registers hold. */
INLINE void tile(const unit *a, size down, size right, const unit *b, size width, float *c, size stride, size rows, size inner,
                 int tall, int vectors, int add)
{
    floats sums[TILE];
    const unit *from[TILE];
    EACH(r, tall) /* where there are fewer rows, the first stands in for the others */
    {
        from[r] = a + (r < rows ? r : 0) * down;
        EACH(v, vectors)
            sums[r * vectors + v] = add ? load_floats(c + (r < rows ? r : 0) * stride + v * LANES, LANES) : all(0);
    }
    for (size k = 0; k < inner; k++) {
        units many[4];
        EACH(v, vectors) memcpy(&many[v], b + k * width + v * LANES, sizeof many[v]);
        EACH(r, tall)
        {
            unit one = from[r][k * right];
            EACH(v, vectors) sums[r * vectors + v] = add_product(sums[r * vectors + v], one, many[v]);
        }
    }
    EACH(r, tall) if (r < rows)
        EACH(v, vectors) store_floats(c + r * stride + v * LANES, sums[r * vectors + v], LANES);
}

#if UNITS
/* `now` units of 16 rows from unit k on: of a row, or where the rows stand side by side, of unit k + r of each. */
INLINE __m512i part_of(const unit *a, size down, size right, size r, size k, size now)
{
    if (right == 1) return _mm512_maskz_loadu_epi32(lanes(now), a + r * down + k);
    return r < now ? _mm512_loadu_si512(a + (k + r) * right) : _mm512_setzero_si512();
}

/* Of 16 rows and `vectors` times 16 columns. What is missing of the rows is read, but not used; of what is summed over it
   is zero. */
INLINE void unit_tile(const unit *a, size down, size right, const unit *b, size width, float *c, size stride, size rows,
                      size inner, int vectors, int add)
{
    _Alignas(64) unit left[LANES * LANES], above[LANES * 4 * LANES];
    _Alignas(64) float sums[LANES * 4 * LANES];
    float *to = rows < LANES ? sums : c;
    size each = rows < LANES ? 4 * LANES : stride;
    if (add && rows < LANES)
        for (size r = 0; r < rows; r++) memcpy(sums + r * each, c + r * stride, vectors * LANES * sizeof *c);
    SETTLED;
    if (add) {
        _tile_loadd(0, to, 4 * each);
        if (vectors > 1) _tile_loadd(1, to + LANES, 4 * each);
        if (vectors > 2) _tile_loadd(2, to + 2 * LANES, 4 * each);
        if (vectors > 3) _tile_loadd(3, to + 3 * LANES, 4 * each);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size k = 0; k < inner; k += LANES) {
        size now = inner - k < LANES ? inner - k : LANES;
        const unit *one = a + k, *many = b + k * width;
        size one_width = down, many_width = width;
        if (now < LANES || right > 1) {
            __m512i some[LANES];
            EACH(r, 8) some[r] = part_of(a, down, right, r, k, now), some[8 + r] = part_of(a, down, right, 8 + r, k, now);
            EACH(r, 8) _mm512_store_si512(left + r * LANES, some[r]), _mm512_store_si512(left + (8 + r) * LANES, some[8 + r]);
            if (right > 1) transpose(left, LANES, left, LANES);
            one = left, one_width = LANES;
        }
        if (now < LANES) {
            memset(above, 0, sizeof above);
            for (size r = 0; r < now; r++)
                memcpy(above + r * 4 * LANES, many + r * width, vectors * LANES * sizeof *many);
            many = above, many_width = 4 * LANES;
        }
        SETTLED;
        _tile_loadd(4, one, 4 * one_width);
        _tile_loadd(5, many, 4 * many_width);
        _tile_dpbf16ps(0, 4, 5);
        if (vectors > 1) {
            _tile_loadd(6, many + LANES, 4 * many_width);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (vectors > 2) {
            _tile_loadd(7, many + 2 * LANES, 4 * many_width);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (vectors > 3) {
            _tile_loadd(5, many + 3 * LANES, 4 * many_width);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, to, 4 * each);
    if (vectors > 1) _tile_stored(1, to + LANES, 4 * each);
    if (vectors > 2) _tile_stored(2, to + 2 * LANES, 4 * each);
    if (vectors > 3) _tile_stored(3, to + 3 * LANES, 4 * each);
    SETTLED;
    if (rows < LANES)
        for (size r = 0; r < rows; r++) memcpy(c + r * stride, sums + r * each, vectors * LANES * sizeof *c);
}
#endif

/* c = a·b, or c += a·b: a(r, k) is at a[r·down + k·right], a row of b has `width` units, and one of c `stride` numbers. */
static void multiply(const unit *a, size down, size right, const unit *b, size width, float *c, size stride, size rows,
                     size columns, size inner, int add)
{
    for (size n = 0; n < columns;) {
        size vectors = (columns - n) / LANES >= 4 ? 4 : (columns - n) / LANES >= 2 ? 2 : 1, tall = vectors == 4 ? 4 : 8;
#if UNITS
        for (size r = 0; matrix_units && r < rows; r += LANES) {
            const unit *from = a + r * down, *with = b + n;
            float *to = c + r * stride + n;
            if (vectors == 4) unit_tile(from, down, right, with, width, to, stride, rows - r, inner, 4, add);
            else if (vectors == 2) unit_tile(from, down, right, with, width, to, stride, rows - r, inner, 2, add);
            else unit_tile(from, down, right, with, width, to, stride, rows - r, inner, 1, add);
        }
#endif
        for (size r = 0; !matrix_units && r < rows; r += tall) {
            const unit *from = a + r * down, *with = b + n;
            float *to = c + r * stride + n;
            if (vectors == 4) tile(from, down, right, with, width, to, stride, rows - r, inner, 4, 4, add);
            else if (vectors == 2) tile(from, down, right, with, width, to, stride, rows - r, inner, 8, 2, add);
            else tile(from, down, right, with, width, to, stride, rows - r, inner, 8, 1, add);
        }
        n += vectors * LANES;
    }
}

/* Rows of `width` numbers as units along the rows, as many rows as fill registers; what is missing is zero. */
INLINE void along_rows(unit *to, const number *x, size stride, size count, size width)
{
    for (size r = 0; r < filled(count); r++)
        for (size i = 0; i < width; i += LANES)
            put(to + r * filled(width) / PAIR, i, r < count ? load(x + r * stride + i, width - i) : all(0));
}

/* The same turned: for each unit along a row those of all rows, filled up with zeros. */
INLINE void turned(unit *to, const number *x, size stride, size count, size width)
{
    size across = filled(filled(width) / PAIR);
    unit some[LANES * across];
    memset(some, 0, sizeof some);
    for (size r = 0; r < count; r += LANES) {
        size now = count - r < LANES ? count - r : LANES;
        for (size one = 0; one < now; one++)
            for (size i = 0; i < width; i += LANES) put(some + one * across, i, load(x + (r + one) * stride + i, width - i));
        for (size one = now; one < LANES; one++) memset(some + one * across, 0, across * sizeof *some);
        for (size k = 0; k < across; k += LANES) transpose(some + k, across, to + k * filled(count) + r, filled(count));
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

/* Texts side by side, or (with bounds) one after another in one row. None sees more than so many tokens. With bounds the
   first `shared` tokens of the row are the beginning of every text, though they stand in the first alone. Where a text, a
   head and a token begin is told by strides; bias is found by text, group, member of the group and query. */
struct job {
    size texts, heads, groups, queries, tokens, width, rows, causal, window, shared, q[3], k[3], v[3], bias[4], seed, bar;
};

/* One text and one group of heads: its own tokens ask, and they see those that stand elsewhere (`before` of them), too. */
struct task {
    size text, group, begin, before, queries, tokens;
    const number *k, *v;
    size k_stride, v_stride;
};

/* Copies of a text's keys or values, one after another: those at the beginning of the row, and its own. */
static const number *joined(const struct task *task, const number *x, size stride, size width, number *room)
{
    for (size token = 0; token < task->tokens; token++) {
        size place = token < task->before ? token : task->begin + token - task->before;
        memcpy(room + token * width, x + place * stride, width * sizeof *room);
    }
    return room;
}

static struct task task_of(const struct job *job, const int32_t *bounds, const number *k, const number *v, number *room,
                           size index)
{
    struct task task = {index / job->groups, index % job->groups, 0, 0, job->queries, job->tokens};
    k += task.group * job->k[1], v += task.group * job->v[1];
    if (bounds) {
        task.begin = bounds[task.text];
        task.before = task.text ? job->shared : 0;
        task.queries = bounds[task.text + 1] - bounds[task.text];
        task.tokens = task.before + task.queries;
    } else k += task.text * job->k[0], v += task.text * job->v[0];
    task.k_stride = task.before ? job->width : job->k[2];
    task.v_stride = task.before ? job->width : job->v[2];
    task.k = task.before ? joined(&task, k, job->k[2], job->width, room) : k + task.begin * job->k[2];
    task.v = task.before ? joined(&task, v, job->v[2], job->width, room + job->tokens * job->width) : v + task.begin * job->v[2];
    return task;
}

/* Some queries of one head. */
struct block {
    size query, count; /* the first of them, and how many */
    size place;        /* of the first among the tokens that the text sees */
    size head, row;    /* the head, and the row of the first query among all texts' */
    size from, until;  /* the keys that any of them sees, in whole units */
    size across;       /* the queries in whole registers: what stands in their lanes has a row of so many for each key */
    const number *q, *bias;
};

static struct block block_of(const struct job *job, const struct task *task, int packed, const number *q, const number *bias,
                             size member, size query)
{
    struct block block = {query, task->queries - query < QUERIES ? task->queries - query : QUERIES};
    block.head = task->group * (job->heads / job->groups) + member;
    block.row = (packed ? task->begin : task->text * job->queries) + query;
    block.place = task->before + query;
    block.from = job->window && block.place >= job->window ? (block.place - job->window + 1) / PAIR * PAIR : 0;
    block.until = ((job->causal ? block.place + block.count : task->tokens) + PAIR - 1) / PAIR * PAIR;
    block.across = filled(block.count);
    block.q = q + (packed ? 0 : task->text * job->q[0]) + block.head * job->q[1] + (task->begin + query) * job->q[2];
    if (bias)
        block.bias = bias + task->text * job->bias[0] + task->group * job->bias[1] + member * job->bias[2] + query * job->bias[3];
    return block;
}

/* The bias of each key for the queries of a block, which stand in lanes. */
static void turn_bias(const struct block *block, size stride, size tokens, float *biases)
{
    for (size r = 0; r < block->across; r += LANES)
        for (size key = 0; key < tokens; key += LANES) {
            float rows[LANES * LANES];
            EACH(one, LANES)
            {
                size from = (r + one) * stride + key;
                floats row = r + one < block->count ? load(block->bias + from, tokens - key) : all(0);
                store_floats(rows + one * LANES, row, LANES);
            }
            transpose((const unit *)rows, LANES, (unit *)biases + key * block->across + r, block->across);
        }
}

/* A key's scores for 16 queries from number `r` on, in fp32; minus infinity for those that do not see it. */
INLINE floats score(const struct job *job, const struct task *task, const struct block *block, const float *scores,
                    const float *biases, size r, size key, float scaling)
{
    size at = key * block->across + r, before = key - block->place - r; /* so many queries stand before the key */
    size low = key >= task->tokens ? LANES : job->causal ? before : 0, high = job->window ? before + job->window : LANES;
    floats z = load_floats(scores + at, LANES) * scaling;
    if (block->bias) z += load_floats(biases + at, LANES);
    if (low <= 0 && high >= LANES) return z;
    ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return choose((lane >= (int)low) & (lane < (int)high), z, all(-INFINITY));
}

/* What the weights of a key are multiplied by in dropout, for 16 queries from number `r` on. */
INLINE floats stays(const struct job *job, const struct block *block, size r, size key, float scale)
{
    uint64_t seed = mixed(job->seed), at = (block->head * filled(job->tokens) + key) * job->rows + block->row + r;
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

/* Of each head `tops` has its queries' highest scores, and then 1 / the sums of the exponentials below them. Dropout leaves
   a weight with `scale`, which is 0 where there is none. */
void attention(const number *q, const number *k, const number *v, const number *bias, const int32_t *bounds,
               const struct job *job, float scaling, float scale, number *y, float *tops, char *memory, size each, size threads)
{
    size wide = filled(job->tokens), width = filled(job->width);
#pragma omp parallel num_threads(threads)
    {
        char *room = memory + omp_get_thread_num() * each;
        unit *keys = take(&room, wide * width), *values = take(&room, wide * width);
        unit *asked = take(&room, QUERIES * width), *weights = take(&room, QUERIES * wide);
        float *scores = take(&room, QUERIES * wide), *biases = take(&room, QUERIES * wide);
        float *sums = take(&room, QUERIES * width);
        number *both = take(&room, 2 * wide * width);
        begin_units();
#pragma omp for schedule(dynamic)
        for (size index = 0; index < job->texts * job->groups; index++) {
            struct task task = task_of(job, bounds, k, v, both, index);
            along_rows(keys, task.k, task.k_stride, task.tokens, job->width);
            down_columns(values, task.v, task.v_stride, task.tokens, job->width);
            for (size member = 0; member < job->heads / job->groups; member++)
                for (size query = 0; query < task.queries; query += QUERIES) {
                    struct block block = block_of(job, &task, !!bounds, q, bias, member, query);
                    size from = block.from, until = block.until, across = block.across;
                    float *highs = tops + 2 * block.head * job->rows + block.row, *shares = highs + job->rows;
                    turned(asked, block.q, job->q[2], block.count, job->width);
                    multiply(keys + from * width / PAIR, width / PAIR, 1, asked, across, scores + from * across, across,
                             until - from, across, width / PAIR, 0);
                    if (bias) turn_bias(&block, job->bias[3], task.tokens, biases);
                    for (size r = 0; r < across; r += LANES) {
                        floats most = all(-INFINITY), sum = {0};
                        for (size key = from; key < until; key++) {
                            floats z = score(job, &task, &block, scores, biases, r, key, scaling);
                            store_floats(scores + key * across + r, z, LANES);
                            most = larger(z, most);
                        }
                        for (size key = from; key < until; key += PAIR) {
                            floats weight[PAIR];
                            EACH(p, PAIR)
                            {
                                weight[p] = exponential(load_floats(scores + (key + p) * across + r, LANES) - most);
                                sum += weight[p];
                                if (scale) weight[p] *= stays(job, &block, r, key + p, scale);
                            }
                            units pair = paired(weight[0], weight[PAIR - 1]);
                            memcpy(weights + key / PAIR * across + r, &pair, sizeof pair);
                        }
                        store_floats(highs + r, most, block.count - r);
                        store_floats(shares + r, 1 / sum, block.count - r);
                    }
                    multiply(weights + from / PAIR * across, 1, across, values + from / PAIR * width, width, sums, width,
                             block.count, width, (until - from) / PAIR, 0);
                    for (size r = 0; r < block.count; r++)
                        for (size i = 0; i < job->width; i += LANES)
                            store(y + ((block.row + r) * job->heads + block.head) * job->width + i,
                                  load_floats(sums + r * width + i, LANES) * shares[r], job->width - i);
                }
        }
        end_units();
    }
}

/* Rows of fp32, of `filled(width)` numbers each, as rows of numbers that lie `stride` apart. */
static void round_rows(const float *from, number *to, size stride, size count, size width)
{
    for (size r = 0; r < count; r++)
        for (size i = 0; i < width; i += LANES)
            store(to + r * stride + i, load_floats(from + r * filled(width) + i, LANES), width - i);
}

/* With weights w = softmax of the scores s:   ds = w · (dw − Σ w·dw),  and from it dq, dk, dv. What every text says of
   those tokens that all share comes into `parts`, (texts, groups, 2, shared, width), to be added up in this order. */
void attention_backward(const number *q, const number *k, const number *v, const number *bias, const int32_t *bounds,
                        const struct job *job, float scaling, float scale, const number *dy, const float *tops, number *dq,
                        number *dk, number *dv, float *parts, char *memory, size each, size threads)
{
    size wide = filled(job->tokens), width = filled(job->width), part = job->shared * width, apart = job->groups * job->width;
#pragma omp parallel num_threads(threads)
    {
        char *room = memory + omp_get_thread_num() * each;
        unit *keys = take(&room, wide * width), *values = take(&room, wide * width), *keys_down = take(&room, wide * width);
        unit *asked = take(&room, QUERIES * width), *given = take(&room, QUERIES * width);
        unit *asked_down = take(&room, QUERIES * width), *given_down = take(&room, QUERIES * width);
        float *weights = take(&room, QUERIES * wide), *slopes = take(&room, QUERIES * wide), *biases = take(&room, QUERIES * wide);
        unit *slopes_down = take(&room, QUERIES * wide), *slopes_along = take(&room, QUERIES * wide);
        unit *weights_along = take(&room, QUERIES * wide);
        float *to_query = take(&room, QUERIES * width), *to_keys = take(&room, wide * width), *to_values = take(&room, wide * width);
        number *both = take(&room, 2 * wide * width);
        begin_units();
#pragma omp for schedule(dynamic)
        for (size index = 0; index < job->texts * job->groups; index++) {
            struct task task = task_of(job, bounds, k, v, both, index);
            along_rows(keys, task.k, task.k_stride, task.tokens, job->width);
            along_rows(values, task.v, task.v_stride, task.tokens, job->width);
            down_columns(keys_down, task.k, task.k_stride, task.tokens, job->width);
            memset(to_keys, 0, filled(task.tokens) * width * sizeof *to_keys);
            memset(to_values, 0, filled(task.tokens) * width * sizeof *to_values);
            for (size member = 0; member < job->heads / job->groups; member++)
                for (size query = 0; query < task.queries; query += QUERIES) {
                    struct block block = block_of(job, &task, !!bounds, q, bias, member, query);
                    size from = block.from, until = block.until, count = block.count, across = block.across;
                    size each_row = job->heads * job->width, pairs = (count + PAIR - 1) / PAIR, inner = width / PAIR;
                    const number *output = dy + block.row * each_row + block.head * job->width;
                    const float *highs = tops + 2 * block.head * job->rows + block.row, *shares = highs + job->rows;
                    turned(asked, block.q, job->q[2], count, job->width);
                    turned(given, output, each_row, count, job->width);
                    down_columns(asked_down, block.q, job->q[2], count, job->width);
                    down_columns(given_down, output, each_row, count, job->width);
                    multiply(keys + from * inner, inner, 1, asked, across, weights + from * across, across, until - from, across,
                             inner, 0);
                    multiply(values + from * inner, inner, 1, given, across, slopes + from * across, across, until - from, across,
                             inner, 0);
                    if (bias) turn_bias(&block, job->bias[3], task.tokens, biases);
                    for (size r = 0; r < across; r += LANES) {
                        floats high = load_floats(highs + r, count - r), share = load_floats(shares + r, count - r);
                        floats products = {0};
                        for (size key = from; key < until; key++) {
                            size at = key * across + r;
                            floats z = score(job, &task, &block, weights, biases, r, key, scaling);
                            floats weight = exponential(z - high) * share, now = load_floats(slopes + at, LANES);
                            if (scale) {
                                floats stay = stays(job, &block, r, key, scale);
                                store_floats(slopes + at, now *= stay, LANES);
                                put(weights_along + key * across / PAIR, r, weight * stay);
                            } else put(weights_along + key * across / PAIR, r, weight);
                            store_floats(weights + at, weight, LANES);
                            products += weight * now;
                        }
                        for (size key = from; key < until; key += PAIR) {
                            floats now[PAIR];
                            EACH(p, PAIR)
                            {
                                size at = (key + p) * across + r;
                                now[p] = load_floats(weights + at, LANES) * (load_floats(slopes + at, LANES) - products) * scaling;
                                put(slopes_along + (key + p) * across / PAIR, r, now[p]);
                            }
                            units pair = paired(now[0], now[PAIR - 1]);
                            memcpy(slopes_down + key / PAIR * across + r, &pair, sizeof pair);
                        }
                    }
                    multiply(slopes_down + from / PAIR * across, 1, across, keys_down + from / PAIR * width, width, to_query, width,
                             count, width, (until - from) / PAIR, 0);
                    round_rows(to_query, dq + block.row * each_row + block.head * job->width, each_row, count, job->width);
                    multiply(slopes_along + from * across / PAIR, across / PAIR, 1, asked_down, width, to_keys + from * width, width,
                             until - from, width, pairs, 1);
                    multiply(weights_along + from * across / PAIR, across / PAIR, 1, given_down, width, to_values + from * width,
                             width, until - from, width, pairs, 1);
                }
            size place = ((bounds ? task.begin : task.text * job->tokens) * job->groups + task.group) * job->width;
            size others = task.before * width, own = task.tokens - task.before;
            round_rows(to_keys + others, dk + place, apart, own, job->width);
            round_rows(to_values + others, dv + place, apart, own, job->width);
            memcpy(parts + 2 * index * part, to_keys, part * sizeof *parts);
            memcpy(parts + (2 * index + 1) * part, to_values, part * sizeof *parts);
        }
#pragma omp for schedule(static)
        for (size index = 0; index < 2 * job->groups * job->shared; index++) {
            size row = index % job->shared, which = index / job->shared; /* a group, and keys or values */
            number *to = (which % 2 ? dv : dk) + row * apart + which / 2 * job->width;
            const float *from = parts + which * part + row * width;
            for (size i = 0; i < job->width; i += LANES) {
                floats sum = all(0);
                for (size text = 0; text < job->texts; text++)
                    sum += load_floats(from + text * 2 * job->groups * part + i, LANES);
                store(to + i, sum, job->width - i);
            }
        }
        end_units();
    }
}

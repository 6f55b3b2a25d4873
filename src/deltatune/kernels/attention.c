/* Attention: the weights of a few queries at a time, which are never written to memory. */

#include "numbers.h"

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

/* Rows of `width` numbers as units along the rows, filled up with zeros. */
INLINE void along_rows(unit *to, const number *x, size stride, size count, size width)
{
    for (size r = 0; r < count; r++)
        for (size i = 0; i < width; i += LANES) put(to + r * filled(width) / PAIR, i, load(x + r * stride + i, width - i));
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

/* Texts side by side, or (with bounds) one after another in one row. None sees more than so many tokens. With bounds the
   first `shared` tokens of the row are the beginning of every text, though they stand in the first alone. Where a text, a
   head and a token begin is told by strides; bias is found by text, group, member of the group and query. */
struct job {
    size texts, heads, groups, queries, tokens, width, causal, window, shared, q[3], k[3], v[3], bias[4], seed, bar;
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
    size from, until;  /* the keys that any of them sees, in whole registers */
    const number *q, *bias;
};

static struct block block_of(const struct job *job, const struct task *task, int packed, const number *q, const number *bias,
                             size member, size query)
{
    struct block block = {query, task->queries - query < QUERIES ? task->queries - query : QUERIES};
    block.head = task->group * (job->heads / job->groups) + member;
    block.row = (packed ? task->begin : task->text * job->queries) + query;
    block.place = task->before + query;
    block.from = job->window && block.place >= job->window ? (block.place - job->window + 1) / LANES * LANES : 0;
    block.until = filled(job->causal ? block.place + block.count : task->tokens);
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
    size high = job->causal ? block->place + r + 1 : task->tokens;
    size low = job->window ? block->place + r + 1 - job->window : 0;
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
        number *both = take(&room, 2 * wide * width);
#pragma omp for schedule(dynamic)
        for (size index = 0; index < job->texts * job->groups; index++) {
            struct task task = task_of(job, bounds, k, v, both, index);
            size across = filled(task.tokens);
            turned(keys, task.k, task.k_stride, task.tokens, job->width);
            down_columns(values, task.v, task.v_stride, task.tokens, job->width);
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
        unit *keys = take(&room, width * wide), *values = take(&room, width * wide), *own_keys = take(&room, wide * width);
        unit *asked = take(&room, QUERIES * width), *given = take(&room, QUERIES * width);
        unit *asked_down = take(&room, QUERIES * width), *given_down = take(&room, QUERIES * width);
        float *weights = take(&room, QUERIES * wide), *slopes = take(&room, QUERIES * wide);
        unit *slopes_along = take(&room, QUERIES * wide), *slopes_down = take(&room, QUERIES * wide);
        unit *weights_down = take(&room, QUERIES * wide);
        float *to_query = take(&room, QUERIES * width), *to_keys = take(&room, wide * width), *to_values = take(&room, wide * width);
        number *both = take(&room, 2 * wide * width);
#pragma omp for schedule(dynamic)
        for (size index = 0; index < job->texts * job->groups; index++) {
            struct task task = task_of(job, bounds, k, v, both, index);
            size across = filled(task.tokens);
            turned(keys, task.k, task.k_stride, task.tokens, job->width);
            turned(values, task.v, task.v_stride, task.tokens, job->width);
            down_columns(own_keys, task.k, task.k_stride, task.tokens, job->width);
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
    }
}

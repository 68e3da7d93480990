/* A linear recurrence for each head: with decay exp(g) (1 if not gated) and, under the delta rule, beta,
 *
 *     S = exp(g) S + k u^T,    u = beta (v - (exp(g) S)^T k)  or  v,    out = scale S^T q
 *
 * A prompt runs in chunks of 32 tokens. With S0 the state before a chunk and w[t][i] the decay from token i to t,
 * U = (I + A)^-1 beta (V - w0 K S0), A[t][i] = beta[t] w[t][i] k[t].k[i] for i < t, so that a chunk is a few matrix
 * products and one forward substitution (Yang et al., Parallelizing Linear Transformers with the Delta Rule over
 * Sequence Length, 2024; Gated Delta Networks, 2024). Decays are sums of the logarithms between two tokens only: no
 * differences, in which digits cancel, and no quotients, which overflow.
 */
#include "vectors.h"

#include "../recurrence.h"

#include <math.h>
#include <string.h>

#include "exponential.h"
#include "products.h"
#include "../scratch.h"

enum {
    CHUNK = 32,
    CHUNK_STEP = 8,             /* tokens of a chunk are rounded up to a multiple of it */
    WIDE = PARTS == 1 ? 4 : 2, /* vectors of a state side by side, as registers allow */
};

/* Scratch memory of a chunk; widths are rounded up to whole vectors, and what is beyond the sizes is 0. */
typedef struct {
    int64_t rows, key_width, value_width;
    float *query, *key;   /* [CHUNK, key_width] */
    float *key_columns;   /* [key_width, CHUNK] */
    float *from_start;    /* [2, CHUNK, key_width]: keys, then queries, times the decay since the chunk's start */
    float *to_end;        /* [CHUNK, key_width]: keys times the decay until its end */
    float *kept;          /* [key_width]: the decay of the whole chunk */
    float *decay, *sum;   /* [CHUNK, key_width] or [CHUNK, 1] logarithms; [key_width] sums of them */
    float *beta, *ones;   /* [CHUNK] */
    float *key_key, *query_key; /* [CHUNK, CHUNK]: dot products, each times the decay between the two tokens */
    float *update, *out;  /* [CHUNK, value_width], one after the other */
} Chunk;

static int64_t whole(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

/* Lays the arrays out in `memory`, if there is any, and returns how many floats they take. */
static int64_t lay_out_chunk(Chunk *chunk, float *memory)
{
    const int64_t keys = CHUNK * chunk->key_width, values = CHUNK * chunk->value_width;
    const struct {
        float **array;
        int64_t size;
    } parts[] = {{&chunk->query, keys},
                 {&chunk->key, keys},
                 {&chunk->key_columns, keys},
                 {&chunk->from_start, 2 * keys},
                 {&chunk->to_end, keys},
                 {&chunk->kept, chunk->key_width},
                 {&chunk->decay, keys},
                 {&chunk->sum, chunk->key_width},
                 {&chunk->beta, CHUNK},
                 {&chunk->ones, CHUNK},
                 {&chunk->key_key, CHUNK * CHUNK},
                 {&chunk->query_key, CHUNK * CHUNK},
                 {&chunk->update, values},
                 {&chunk->out, values}};
    int64_t used = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (memory != NULL)
            *parts[i].array = memory + used;
        used += parts[i].size;
    }
    return used;
}

/* Copies a query or key, normalized if asked to, times a factor. */
static void read_row(const float *from, int64_t size, float epsilon, float factor, float *to)
{
    if (epsilon > 0) {
        F16 sum = floats(0);
        for (int64_t d = 0; d < size; d += LANES) {
            const F16 x = load_some(from + d, size - d);
            sum = mul_add(x, x, sum);
        }
        factor /= sqrtf(sum_of(sum) + epsilon);
    }
    for (int64_t d = 0; d < size; d += LANES)
        store(to + d, mul(load_some(from + d, size - d), floats(factor)));
}

/* One head of one sequence. */
typedef struct {
    const RecurrenceParams *params;
    const RecurrenceCall *call;
    const float *query, *key, *value, *decay, *beta; /* of its first token */
    float *out, *state;
    int64_t decays;       /* numbers of decay for each token: 1, or the key's channels */
    int64_t decay_stride; /* from token to token */
} Head;

static void read_tokens(const Head *head, Chunk *chunk, int64_t start, int64_t count)
{
    const RecurrenceParams *params = head->params;
    const RecurrenceCall *call = head->call;
    const int64_t width = chunk->key_width, decays = head->decays > 1 ? width : 1;
    chunk->rows = (count + CHUNK_STEP - 1) / CHUNK_STEP * CHUNK_STEP;
    memset(chunk->query + count * width, 0, (chunk->rows - count) * width * sizeof(float));
    memset(chunk->key + count * width, 0, (chunk->rows - count) * width * sizeof(float));
    memset(chunk->decay, 0, CHUNK * decays * sizeof(float));
    memset(chunk->beta, 0, CHUNK * sizeof(float));
    for (int64_t t = 0; t < count; t++) {
        const int64_t token = start + t;
        read_row(head->query + token * call->query_stride, params->key_dim, params->epsilon, params->scale,
                 chunk->query + t * width);
        read_row(head->key + token * call->key_stride, params->key_dim, params->epsilon, 1, chunk->key + t * width);
        if (params->gated)
            memcpy(chunk->decay + t * decays, head->decay + token * head->decay_stride, head->decays * sizeof(float));
        if (params->delta)
            chunk->beta[t] = head->beta[token * params->heads];
    }
}

/* rows times weights[row] */
static void scale_rows(const Chunk *chunk, const float *from, const float *weights, float *to)
{
    const int64_t width = chunk->key_width;
    for (int64_t t = 0; t < chunk->rows; t++)
        for (int64_t d = 0; d < width; d += LANES)
            store(to + t * width + d, mul(floats(weights[t]), load(from + t * width + d)));
}

/* Dot products and decays, if all channels of a head decay alike. */
static void weigh_tokens(Chunk *chunk)
{
    const int64_t rows = chunk->rows, width = chunk->key_width;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t d = 0; d < width; d++)
            chunk->key_columns[d * CHUNK + t] = chunk->key[t * width + d];
    Product product = {.a = chunk->key, .a_row = width, .a_column = 1, .b = chunk->key_columns, .b_row = CHUNK,
                       .c = chunk->key_key, .c_row = CHUNK, .inner = width};
    multiply(&product, rows, rows);
    product.a = chunk->query, product.c = chunk->query_key;
    multiply(&product, rows, rows);
    float from_start[CHUNK], to_end[CHUNK], sums[CHUNK];
    F16 between[2] = {floats(0), floats(0)}; /* the logarithm from each token to t */
    float sum = 0;
    for (int64_t t = 0; t < rows; t++) {
        const F16 decay = floats(chunk->decay[t]);
        sums[t] = sum += chunk->decay[t];
        UNROLL for (int half = 0; half < 2; half++) {
            between[half] = only_where(lanes_below(t - half * LANES), add(between[half], decay));
            const I16 seen = lanes_below(t + 1 - half * LANES);
            const F16 weight = only_where(seen, exp_lanes(between[half]));
            float *keys = chunk->key_key + t * CHUNK + half * LANES, *queries = chunk->query_key + t * CHUNK + half * LANES;
            store(keys, only_where(seen, mul(weight, load(keys))));
            store(queries, only_where(seen, mul(weight, load(queries))));
            if (t == rows - 1)
                store(to_end + half * LANES, weight);
        }
    }
    for (int64_t t = rows; t < CHUNK; t++)
        sums[t] = 0;
    for (int half = 0; half < 2; half++)
        store(from_start + half * LANES, exp_lanes(load(sums + half * LANES)));
    scale_rows(chunk, chunk->key, from_start, chunk->from_start);
    scale_rows(chunk, chunk->query, from_start, chunk->from_start + rows * width);
    scale_rows(chunk, chunk->key, to_end, chunk->to_end);
    for (int64_t d = 0; d < width; d++)
        chunk->kept[d] = from_start[rows - 1];
}

/* The same if each channel has a decay of its own. */
static void weigh_channels(Chunk *chunk)
{
    const int64_t rows = chunk->rows, width = chunk->key_width;
    float *keys = chunk->from_start, *queries = keys + rows * width;
    memset(chunk->key_key, 0, rows * CHUNK * sizeof(float));
    memset(chunk->query_key, 0, rows * CHUNK * sizeof(float));
    for (int64_t t = 0; t < rows; t++) {
        memset(chunk->sum, 0, width * sizeof(float));
        for (int64_t i = t; i >= 0; i--) {
            F16 key_key = floats(0), query_key = floats(0);
            for (int64_t d = 0; d < width; d += LANES) {
                const F16 sum = load(chunk->sum + d), key = mul(exp_lanes(sum), load(chunk->key + i * width + d));
                key_key = mul_add(key, load(chunk->key + t * width + d), key_key);
                query_key = mul_add(key, load(chunk->query + t * width + d), query_key);
                if (t == rows - 1)
                    store(chunk->to_end + i * width + d, key);
                store(chunk->sum + d, add(sum, load(chunk->decay + i * width + d)));
            }
            chunk->key_key[t * CHUNK + i] = sum_of(key_key);
            chunk->query_key[t * CHUNK + i] = sum_of(query_key);
        }
        for (int64_t d = 0; d < width; d += LANES) {
            const F16 decay = exp_lanes(load(chunk->sum + d));
            store(keys + t * width + d, mul(decay, load(chunk->key + t * width + d)));
            store(queries + t * width + d, mul(decay, load(chunk->query + t * width + d)));
            store(chunk->kept + d, decay);
        }
    }
}

/* `left` columns, WIDE vectors if `whole`, of a token of `update`; those of the tokens before it are solved. */
INLINE void solve_token(const bool whole, const bool delta, const Chunk *chunk, int64_t t, const float *value, float *row,
                        int64_t left)
{
    const F16 beta = floats(chunk->beta[t]);
    F16 sum[WIDE];
    UNROLL for (int part = 0; part < WIDE; part++) {
        sum[part] = value == NULL ? floats(0) : load_up_to(whole, value + part * LANES, left - part * LANES);
        if (delta)
            sum[part] = sub(sum[part], load_up_to(whole, row + part * LANES, left - part * LANES));
    }
    for (int64_t i = 0; delta && i < t; i++) {
        const F16 weight = floats(chunk->key_key[t * CHUNK + i]);
        const float *before = row + (i - t) * chunk->value_width;
        UNROLL for (int part = 0; part < WIDE; part++)
            sum[part] = mul_sub_from(weight, load_up_to(whole, before + part * LANES, left - part * LANES), sum[part]);
    }
    UNROLL for (int part = 0; part < WIDE; part++)
        store_up_to(whole, row + part * LANES, left - part * LANES, delta ? mul(beta, sum[part]) : sum[part]);
}

/* update: V, or (I + A)^-1 beta (V - update) by forward substitution. */
static void solve(const Head *head, Chunk *chunk, int64_t start, int64_t count)
{
    const int64_t columns = head->params->value_dim;
    const bool delta = head->params->delta;
    for (int64_t column = 0; column < columns; column += WIDE * LANES)
        for (int64_t t = 0; t < chunk->rows; t++) {
            const float *value = t < count ? head->value + (start + t) * head->call->value_stride + column : NULL;
            float *row = chunk->update + t * chunk->value_width + column;
            if (column + WIDE * LANES <= columns)
                solve_token(true, delta, chunk, t, value, row, WIDE * LANES);
            else
                solve_token(false, delta, chunk, t, value, row, columns - column);
        }
}

static void run_chunk(const Head *head, Chunk *chunk, int64_t start, int64_t count)
{
    const RecurrenceParams *params = head->params;
    const int64_t keys = params->key_dim, values = params->value_dim, width = chunk->key_width;
    read_tokens(head, chunk, start, count);
    (head->decays > 1 ? weigh_channels : weigh_tokens)(chunk);
    const int64_t rows = chunk->rows, first = params->delta ? 0 : rows; /* what keys find in the state is not needed */
    chunk->out = chunk->update + rows * chunk->value_width;
    Product product = {.a = chunk->from_start + first * width, .a_row = width, .a_column = 1, .b = head->state,
                       .b_row = values, .c = chunk->update + first * chunk->value_width, .c_row = chunk->value_width,
                       .inner = keys};
    multiply(&product, 2 * rows - first, values);
    solve(head, chunk, start, count);
    product = (Product){.a = chunk->query_key, .a_row = CHUNK, .a_column = 1, .b = chunk->update,
                        .b_row = chunk->value_width, .c = chunk->out, .c_row = chunk->value_width,
                        .keep = chunk->ones, .inner = rows};
    multiply(&product, rows, values);
    for (int64_t t = 0; t < count; t++)
        memcpy(head->out + (start + t) * params->heads * values, chunk->out + t * chunk->value_width,
               values * sizeof(float));
    product = (Product){.a = chunk->to_end, .a_row = 1, .a_column = width, .b = chunk->update,
                        .b_row = chunk->value_width, .c = head->state, .c_row = values, .keep = chunk->kept,
                        .inner = rows};
    multiply(&product, keys, values);
}

/* `left` columns, WIDE vectors if `whole`, of the state and the output of a token. */
INLINE void update_columns(const bool whole, const Head *head, const Chunk *chunk, int64_t column, int64_t left)
{
    const int64_t keys = head->params->key_dim, values = head->params->value_dim;
    float *state = head->state + column;
    F16 update[WIDE], out[WIDE];
    UNROLL for (int part = 0; part < WIDE; part++) {
        update[part] = load_up_to(whole, head->value + column + part * LANES, left - part * LANES);
        out[part] = floats(0);
    }
    if (head->params->delta) {
        F16 found[WIDE];
        UNROLL for (int part = 0; part < WIDE; part++)
            found[part] = floats(0);
        for (int64_t d = 0; d < keys; d++) {
            const F16 key = floats(chunk->key[d] * chunk->kept[d]);
            UNROLL for (int part = 0; part < WIDE; part++)
                found[part] = mul_add(key, load_up_to(whole, state + d * values + part * LANES, left - part * LANES),
                                      found[part]);
        }
        UNROLL for (int part = 0; part < WIDE; part++)
            update[part] = mul(floats(chunk->beta[0]), sub(update[part], found[part]));
    }
    for (int64_t d = 0; d < keys; d++) {
        const F16 kept = floats(chunk->kept[d]), key = floats(chunk->key[d]), query = floats(chunk->query[d]);
        UNROLL for (int part = 0; part < WIDE; part++) {
            float *place = state + d * values + part * LANES;
            const F16 s = mul_add(key, update[part], mul(kept, load_up_to(whole, place, left - part * LANES)));
            out[part] = mul_add(query, s, out[part]);
            store_up_to(whole, place, left - part * LANES, s);
        }
    }
    UNROLL for (int part = 0; part < WIDE; part++)
        store_up_to(whole, head->out + column + part * LANES, left - part * LANES, out[part]);
}

/* One token: the state is read twice and written once. */
static void run_token(const Head *head, Chunk *chunk)
{
    const int64_t values = head->params->value_dim;
    read_tokens(head, chunk, 0, 1);
    for (int64_t d = 0; d < chunk->key_width; d += LANES)
        store(chunk->kept + d, exp_lanes(head->decays > 1 ? load(chunk->decay + d) : floats(chunk->decay[0])));
    int64_t column = 0;
    for (; column + WIDE * LANES <= values; column += WIDE * LANES)
        update_columns(true, head, chunk, column, WIDE * LANES);
    if (column < values)
        update_columns(false, head, chunk, column, values - column);
}

typedef struct {
    const RecurrenceParams *params;
    const RecurrenceCall *call;
    bool failed;
} HeadWork;

static void run_head(void *data, size_t index)
{
    HeadWork *work = data;
    const RecurrenceParams *params = work->params;
    const RecurrenceCall *call = work->call;
    const int64_t heads = params->heads, keys = params->key_dim, values = params->value_dim;
    const int64_t sequence = (int64_t)index / heads, own = (int64_t)index % heads, tokens = call->tokens;
    const int64_t shared = own / (heads / params->key_heads), first = sequence * tokens, size = keys * values;
    const int64_t decays = call->channel_decay ? keys : 1;
    Head head = {.params = params,
                 .call = call,
                 .query = call->query + first * call->query_stride + shared * keys,
                 .key = call->key + first * call->key_stride + shared * keys,
                 .value = call->value + first * call->value_stride + own * values,
                 .decay = params->gated ? call->decay + (first * heads + own) * decays : NULL,
                 .beta = params->delta ? call->beta + first * heads + own : NULL,
                 .out = call->out + (first * heads + own) * values,
                 .state = call->present + (int64_t)index * size,
                 .decays = decays,
                 .decay_stride = heads * decays};
    Chunk chunk = {.key_width = whole(keys), .value_width = whole(values)};
    float *memory = thread_scratch(OF_TASK, lay_out_chunk(&chunk, NULL) * sizeof(float));
    if (memory == NULL) {
        __atomic_store_n(&work->failed, true, __ATOMIC_RELAXED);
        return;
    }
    lay_out_chunk(&chunk, memory);
    for (int i = 0; i < CHUNK; i++)
        chunk.ones[i] = 1;
    if (call->past != call->present)
        memcpy(head.state, call->past + (int64_t)index * size, size * sizeof(float));
    if (tokens == 1 || call->steps)
        for (int64_t t = 0; t < tokens; t++) {
            run_token(&head, &chunk);
            head.query += call->query_stride, head.key += call->key_stride, head.value += call->value_stride;
            head.decay += params->gated ? head.decay_stride : 0, head.beta += params->delta ? heads : 0;
            head.out += heads * values;
        }
    else
        for (int64_t start = 0; start < tokens; start += CHUNK)
            run_chunk(&head, &chunk, start, tokens - start < CHUNK ? tokens - start : CHUNK);
}

static const char *recurrence_run(const RecurrenceParams *params, const RecurrenceCall *call, const Parallel *parallel)
{
    HeadWork work = {params, call, false};
    parallel_for(parallel, (size_t)(call->batch * params->heads), run_head, &work);
    return work.failed ? "satchel:LinearAttention: out of memory" : NULL;
}

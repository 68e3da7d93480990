#include "vectors.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "attention_internal.h"
#include "exponential.h"

/* Attention of sequences with one new token. Its keys are split into ranges. A task takes one range of one key head
 * for all its query heads, and stores their maximum, the sum of exponentials and the weighted values. These are merged
 * in the order of the ranges (as in Flash-Decoding). The split depends on the number of keys only. */
enum {
    ROWS = 4,
    MAX_RANGE = 512,
    STRIDE = MAX_RANGE + LANES, /* a run of keys is stored in whole steps */
    CACHED = 64,                /* values that are read once for each vector of columns */
    KEYS_AHEAD = 2048,          /* bytes: processors do not fetch ahead across pages by themselves */
};

/* Keys in a range. Short ranges give work to more threads, long ones are read from memory faster. */
static int64_t range_of(int64_t keys)
{
    int64_t most = keys <= 4096 ? 256 : MAX_RANGE, ranges = max64(keys < 128 ? 1 : 2, (keys + most - 1) / most);
    return ((keys + ranges - 1) / ranges + LANES - 1) / LANES * LANES;
}

static int64_t seen_keys(const AttentionCall *call, int64_t row)
{
    int64_t position = past_tokens(call, row);
    return position + 1 - first_key(call, position);
}

static int64_t decode_ranges(const AttentionCall *call, int64_t row)
{
    int64_t keys = seen_keys(call, row);
    return (keys + range_of(keys) - 1) / range_of(keys);
}

static int64_t decode_work(const AttentionCall *call, int64_t row)
{
    return seen_keys(call, row) * call->heads * call->head_dim;
}

/* sum[r] += the products of 16 channels of a key with those of `rows` queries. */
INLINE void add_channels(F16 *sum, const void *keys, int64_t from, const float *query, int64_t head_dim, int64_t left,
                         const bool whole, const int rows, const CacheType type)
{
    const F16 x = whole && type == CACHE_FLOAT ? load_once((const float *)keys + from) : load_cached(type, keys, from, whole, left);
    UNROLL
    for (int r = 0; r < rows; r++) {
        const float *at = query + r * head_dim;
        sum[r] = mul_add(load_up_to(whole, at, left), x, sum[r]);
    }
}

/* scores[rows][4 or 16 keys from the first on] of `rows` queries: 4 keys at a time, 16 with a single query.
 * Their values are fetched on the way, so that memory is never idle. */
INLINE void decode_scores(const float *query, const void *keys, const void *values, int64_t count, int64_t head_dim,
                          float *scores, const int rows, const CacheType type)
{
    const int step = rows == 1 ? 16 : 4;
    for (int64_t key = 0; key < count; key += step) {
        F16 sum[16];
        UNROLL
        for (int i = 0; i < 16; i++)
            sum[i] = floats(0);
        UNROLL
        for (int k = 0; k < step; k++) { /* key by key, in the order of memory */
            const int64_t from = min64(key + k, count - 1) * head_dim;
            F16 own[ROWS] = {floats(0), floats(0), floats(0), floats(0)};
            int64_t d = 0;
            for (; d + LANES <= head_dim; d += LANES) {
                if (d * element_bytes(type) % BYTES == 0) {
                    __builtin_prefetch((const char *)values + (from + d) * element_bytes(type), 0, 2);
                    __builtin_prefetch((const char *)keys + (from + d) * element_bytes(type) + KEYS_AHEAD, 0, 2);
                }
                add_channels(own, keys, from + d, query + d, head_dim, LANES, true, rows, type);
            }
            if (d < head_dim)
                add_channels(own, keys, from + d, query + d, head_dim, head_dim - d, false, rows, type);
            UNROLL
            for (int r = 0; r < rows; r++)
                sum[r * 4 + k] = own[r];
        }
        const F16 sums = sums_of(sum);
        if (rows == 1) {
            store(scores + key, sums);
            continue;
        }
        float each[LANES];
        store(each, sums);
        UNROLL
        for (int r = 0; r < rows; r++)
            memcpy(scores + r * STRIDE + key, each + 4 * r, 4 * sizeof *each);
    }
}

/* Scores to powers of their maximum; what is beyond the last key becomes 0. */
static void softmax(float *scores, int64_t count, float cap, float *maximum, float *total)
{
    const F16 none = floats(-INFINITY);
    F16 most = none, sum = floats(0);
    for (int64_t key = 0; key < count; key += LANES) {
        F16 score = load(scores + key);
        if (cap > 0)
            score = mul(tanh_lanes(score), floats(cap));
        if (key + LANES > count)
            score = choose(lanes_below(count - key), score, none);
        store(scores + key, score);
        most = larger(most, score);
    }
    *maximum = fmaxf(largest_of(most), -0x1p+126f); /* finite: infinity minus infinity is NaN */
    most = floats(*maximum);
    for (int64_t key = 0; key < count; key += LANES) {
        F16 power = exp2_lanes(sub(load(scores + key), most));
        store(scores + key, power);
        sum = add(sum, power);
    }
    *total = sum_of(sum);
}

/* out[rows][columns] += scores * values, for some vectors of columns, the last of which has `left`; the first keys start
 * at zero. */
INLINE void decode_values(const float *scores, const void *values, int64_t count, int64_t head_dim, bool start,
                          int64_t left, float *out, const int rows, const int vectors, const bool whole, const CacheType type)
{
    F16 sum[ROWS][4];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < vectors; c++)
            sum[r][c] = start ? floats(0) : load_up_to(whole, out + r * head_dim + c * LANES, left);
    for (int64_t key = 0; key < count; key++) {
        F16 x[4];
        UNROLL
        for (int c = 0; c < vectors; c++)
            x[c] = load_cached(type, values, key * head_dim + c * LANES, whole, left);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const F16 score = floats(scores[r * STRIDE + key]);
            UNROLL
            for (int c = 0; c < vectors; c++)
                sum[r][c] = mul_add(score, x[c], sum[r][c]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < vectors; c++)
            store_up_to(whole, out + r * head_dim + c * LANES, left, sum[r][c]);
}

/* The same for all columns. A single query has registers for 4 vectors of them everywhere. */
INLINE void add_values(const float *scores, const void *values, int64_t count, int64_t head_dim, bool start, float *out,
                       const int rows, const CacheType type)
{
    const int most = 4 / rows > TILE_VECTORS ? 4 / rows : TILE_VECTORS;
    for (int64_t column = 0, vectors; column < head_dim; column += vectors * LANES) {
        const int64_t left = head_dim - column;
        const void *value = (const char *)values + column * element_bytes(type);
        float *to = out + column;
        vectors = max64(1, min64(left / LANES, most));
        if (left < LANES)
            decode_values(scores, value, count, head_dim, start, left, to, rows, 1, false, type);
        else if (vectors == 1)
            decode_values(scores, value, count, head_dim, start, LANES, to, rows, 1, true, type);
        else if (vectors == 2)
            decode_values(scores, value, count, head_dim, start, LANES, to, rows, 2, true, type);
        else if (vectors == 3)
            decode_values(scores, value, count, head_dim, start, LANES, to, rows, 3, true, type);
        else
            decode_values(scores, value, count, head_dim, start, LANES, to, rows, 4, true, type);
    }
}

/* The keys of one range, for `rows` query heads. */
typedef struct {
    const AttentionPlan *plan;
    int64_t row, kv_head, from, count;
    const float *query;           /* [rows, head_dim] */
    float *out, *maximum, *total; /* [rows, head_dim], [rows], [rows] */
} Range;

INLINE void attend(const Range *range, const int rows, const CacheType type)
{
    const AttentionPlan *plan = range->plan;
    const AttentionCall *call = plan->call;
    int64_t head_dim = call->head_dim, from = range->from, end = from + range->count;
    float scores[ROWS * STRIDE];
    for (int64_t key = from, next; key < end; key = next) {
        next = run_end(plan, key, end);
        int64_t place = place_of(plan, range->row, range->kv_head, key);
        decode_scores(range->query, cache_at(call, call->present_key, place), cache_at(call, call->present_value, place),
                      next - key, head_dim, scores + key - from, rows, type);
    }
    for (int r = 0; r < rows; r++)
        softmax(scores + r * STRIDE, range->count, plan->cap, range->maximum + r, range->total + r);
    for (int64_t key = from, next; key < end; key = next) {
        next = min64(run_end(plan, key, end), key + CACHED);
        const void *values = cache_at(call, call->present_value, place_of(plan, range->row, range->kv_head, key));
        add_values(scores + key - from, values, next - key, head_dim, key == from, range->out, rows, type);
    }
}

/* The same for each number of query heads that are done together, and each kind of cache. */
#define ATTEND(rows)                                                                        \
    static void attend_##rows(const Range *range) { attend(range, rows, CACHE_FLOAT); }     \
    static void attend_half_##rows(const Range *range) { attend(range, rows, CACHE_HALF); } \
    static void attend_int8_##rows(const Range *range) { attend(range, rows, CACHE_INT8); }
ATTEND(1)
ATTEND(2)
ATTEND(3)
ATTEND(4)
static void (*const ATTEND[][ROWS])(const Range *) = {{attend_1, attend_2, attend_3, attend_4},
                                                      {attend_half_1, attend_half_2, attend_half_3, attend_half_4},
                                                      {attend_int8_1, attend_int8_2, attend_int8_3, attend_int8_4}};

static void decode_queries(const AttentionPlan *plan, int64_t row, int64_t kv_head)
{
    const AttentionCall *call = plan->call;
    for (int64_t head = first_head(plan, kv_head); head < last_head(plan, kv_head); head++)
        rotate_query(plan, row, 0, head, plan->queries + (row * call->heads + head) * call->head_dim);
}

static void decode_task(const AttentionPlan *plan, int64_t index)
{
    const AttentionCall *call = plan->call;
    int64_t kv_head = index % call->kv_heads, place = index / call->kv_heads, head_dim = call->head_dim;
    int64_t row = part_of(plan->ranges, call->batch, place), position = past_tokens(call, row);
    int64_t length = range_of(seen_keys(call, row));
    int64_t from = first_key(call, position) + (place - plan->ranges[row]) * length;
    float *out = plan->partials + place * call->heads * (head_dim + 2), *maximum = out + call->heads * head_dim;
    for (int64_t at = first_head(plan, kv_head), last = last_head(plan, kv_head); at < last; at += ROWS) {
        int64_t rows = min64(last - at, ROWS);
        Range range = {.plan = plan,
                       .row = row,
                       .kv_head = kv_head,
                       .from = from,
                       .count = min64(length, position + 1 - from),
                       .query = plan->queries + (row * call->heads + at) * head_dim,
                       .out = out + at * head_dim,
                       .maximum = maximum + at,
                       .total = maximum + call->heads + at};
        ATTEND[call->cache_type][rows - 1](&range);
    }
}

/* The ranges of one row and head to its output. */
static void merge(const AttentionPlan *plan, int64_t row, int64_t head)
{
    const AttentionCall *call = plan->call;
    int64_t head_dim = call->head_dim, from = plan->ranges[row], to = plan->ranges[row + 1];
    int64_t width = call->heads * (head_dim + 2);
    const float *partials = plan->partials, *maxima = partials + call->heads * head_dim + head;
    float maximum = maxima[from * width], total = 0, *out = out_of(call, row, 0, head);
    for (int64_t range = from; range < to; range++)
        maximum = fmaxf(maximum, maxima[range * width]);
    memset(out, 0, (size_t)head_dim * sizeof(float));
    for (int64_t range = from; range < to; range++) {
        F16 factor = exp2_lanes(floats(maxima[range * width] - maximum));
        total += first_of(factor) * maxima[range * width + call->heads];
        for (int64_t d = 0; d < head_dim; d += LANES) {
            F16 part = load_some(partials + range * width + head * head_dim + d, head_dim - d);
            store_some(out + d, head_dim - d, mul_add(factor, part, load_some(out + d, head_dim - d)));
        }
    }
    for (int64_t d = 0; d < head_dim; d++)
        out[d] /= total;
    if (is_int8(call))
        scale_channels(head_dim, call->value_scale + head / plan->group * head_dim, out);
}

static void decode_merge(const AttentionPlan *plan, int64_t row)
{
    const int64_t first = plan->call->first_head;
    for (int64_t head = first; head < first + plan->call->own_heads; head++)
        merge(plan, row, head);
}

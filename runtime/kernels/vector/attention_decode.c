#include "vectors.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "attention_internal.h"
#include "exponential.h"

/* Attention of sequences with one new token. Its keys are split into ranges. A task takes one range of one key head
 * for all its query heads, and stores their maximum, the sum of exponentials and the weighted values. These are merged
 * in the order of the ranges (as in Flash-Decoding). The split depends on the number of keys only. */
enum { ROWS = 4, MAX_RANGE = 512, STRIDE = MAX_RANGE + LANES }; /* a run of keys is stored in whole steps */

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

/* A macro, since clang wants constants in the intrinsics' own arguments. */
#define add_shuffled(a, b, first, second) \
    _mm512_add_ps(_mm512_shuffle_f32x4(a, b, first), _mm512_shuffle_f32x4(a, b, second))

/* 16 vectors to their sums: lane 4i + j has that of vector 4i + j. */
INLINE __m512 sum_lanes(const __m512 v[16])
{
    __m512 four[4];
    UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512 *a = v + 4 * i;
        __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
        __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
        four[i] = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
    }
    __m512 low = add_shuffled(four[0], four[1], 0x44, 0xee), high = add_shuffled(four[2], four[3], 0x44, 0xee);
    return add_shuffled(low, high, 0x88, 0xdd);
}

/* scores[rows][4 or 16 keys from the first on] of `rows` queries: 4 keys at a time, 16 with a single query.
 * Their values are fetched on the way, so that memory is never idle. */
INLINE void decode_scores(const float *query, const float *keys, const float *values, int64_t count, int64_t head_dim,
                          float *scores, const int rows)
{
    const int step = rows == 1 ? 16 : 4;
    for (int64_t key = 0; key < count; key += step) {
        __m512 sum[16];
        const float *at[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            sum[i] = _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int k = 0; k < step; k++)
            at[k] = keys + min64(key + k, count - 1) * head_dim;
#pragma GCC unroll 16
        for (int k = 0; k < step; k++) /* key by key, in the order of memory */
            for (int64_t d = 0; d < head_dim; d += LANES) {
                __mmask16 mask = lanes(head_dim - d);
                __m512 x = _mm512_maskz_loadu_ps(mask, at[k] + d);
                _mm_prefetch(values + (at[k] - keys) + d, _MM_HINT_T1);
                UNROLL
                for (int r = 0; r < rows; r++)
                    sum[r * 4 + k]
                        = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, query + r * head_dim + d), x, sum[r * 4 + k]);
            }
        __m512 sums = sum_lanes(sum);
        if (rows == 1) {
            _mm512_storeu_ps(scores + key, sums);
            continue;
        }
        _mm_storeu_ps(scores + key, _mm512_castps512_ps128(sums));
        _mm_storeu_ps(scores + STRIDE + key, _mm512_extractf32x4_ps(sums, 1));
        if (rows > 2)
            _mm_storeu_ps(scores + 2 * STRIDE + key, _mm512_extractf32x4_ps(sums, 2));
        if (rows > 3)
            _mm_storeu_ps(scores + 3 * STRIDE + key, _mm512_extractf32x4_ps(sums, 3));
    }
}

/* Scores to powers of their maximum; what is beyond the last key becomes 0. */
static void softmax(float *scores, int64_t count, float cap, float *maximum, float *total)
{
    const __m512 none = _mm512_set1_ps(-INFINITY);
    __m512 most = none, sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < count; key += LANES) {
        __m512 score = _mm512_maskz_loadu_ps(lanes(count - key), scores + key);
        if (cap > 0)
            score = _mm512_mul_ps(tanh_lanes(score), _mm512_set1_ps(cap));
        score = _mm512_mask_blend_ps(lanes(count - key), none, score);
        _mm512_storeu_ps(scores + key, score);
        most = _mm512_max_ps(most, score);
    }
    *maximum = fmaxf(_mm512_reduce_max_ps(most), -0x1p+126f); /* finite: infinity minus infinity is NaN */
    most = _mm512_set1_ps(*maximum);
    for (int64_t key = 0; key < count; key += LANES) {
        __m512 power = exp2_lanes(_mm512_sub_ps(_mm512_loadu_ps(scores + key), most));
        _mm512_storeu_ps(scores + key, power);
        sum = _mm512_add_ps(sum, power);
    }
    *total = _mm512_reduce_add_ps(sum);
}

/* out[rows][columns] += scores * values, for up to 4 vectors of columns; the first keys start at zero. */
INLINE void decode_values(const float *scores, const float *values, int64_t count, int64_t head_dim, bool start,
                          __mmask16 tail, float *out, const int rows, const int vectors)
{
    __m512 sum[ROWS][4];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < vectors; c++)
            sum[r][c] = _mm512_maskz_loadu_ps(start ? 0 : c == vectors - 1 ? tail : 0xffff,
                                              out + r * head_dim + c * LANES);
    for (int64_t key = 0; key < count; key++) {
        __m512 x[4];
        UNROLL
        for (int c = 0; c < vectors; c++)
            x[c] = _mm512_maskz_loadu_ps(c == vectors - 1 ? tail : 0xffff, values + key * head_dim + c * LANES);
        UNROLL
        for (int r = 0; r < rows; r++) {
            __m512 score = _mm512_set1_ps(scores[r * STRIDE + key]);
            UNROLL
            for (int c = 0; c < vectors; c++)
                sum[r][c] = _mm512_fmadd_ps(score, x[c], sum[r][c]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < vectors; c++)
            _mm512_mask_storeu_ps(out + r * head_dim + c * LANES, c == vectors - 1 ? tail : 0xffff, sum[r][c]);
}

/* The keys of one range, for `rows` query heads. */
typedef struct {
    const AttentionPlan *plan;
    int64_t row, kv_head, from, count;
    const float *query;           /* [rows, head_dim] */
    float *out, *maximum, *total; /* [rows, head_dim], [rows], [rows] */
} Range;

INLINE void attend(const Range *range, const int rows)
{
    const AttentionPlan *plan = range->plan;
    const AttentionCall *call = plan->call;
    int64_t head_dim = call->head_dim, from = range->from, end = from + range->count;
    float scores[ROWS * STRIDE];
    for (int64_t key = from, next; key < end; key = next) {
        next = run_end(plan, key, end);
        int64_t place = place_of(plan, range->row, range->kv_head, key);
        decode_scores(range->query, call->present_key + place, call->present_value + place, next - key, head_dim,
                      scores + key - from, rows);
    }
    for (int r = 0; r < rows; r++)
        softmax(scores + r * STRIDE, range->count, plan->cap, range->maximum + r, range->total + r);
    for (int64_t column = 0; column < head_dim; column += 4 * LANES) {
        int64_t left = min64(head_dim - column, 4 * LANES), vectors = (left + LANES - 1) / LANES;
        __mmask16 tail = lanes(left - (vectors - 1) * LANES);
        float *out = range->out + column;
        for (int64_t key = from, next; key < end; key = next) {
            next = run_end(plan, key, end);
            const float *at = scores + key - from;
            const float *value = call->present_value + place_of(plan, range->row, range->kv_head, key) + column;
            switch (vectors) {
            case 1: decode_values(at, value, next - key, head_dim, key == from, tail, out, rows, 1); break;
            case 2: decode_values(at, value, next - key, head_dim, key == from, tail, out, rows, 2); break;
            case 3: decode_values(at, value, next - key, head_dim, key == from, tail, out, rows, 3); break;
            default: decode_values(at, value, next - key, head_dim, key == from, tail, out, rows, 4);
            }
        }
    }
}

/* The same for each number of query heads that are done together. */
static void attend_one(const Range *range) { attend(range, 1); }
static void attend_two(const Range *range) { attend(range, 2); }
static void attend_three(const Range *range) { attend(range, 3); }
static void attend_four(const Range *range) { attend(range, 4); }
static void (*const ATTEND[])(const Range *) = {attend_one, attend_two, attend_three, attend_four};

static void decode_queries(const AttentionPlan *plan, int64_t row, int64_t kv_head)
{
    const AttentionCall *call = plan->call;
    for (int64_t head = kv_head * plan->group; head < (kv_head + 1) * plan->group; head++)
        rotate_head(call, query_of(plan, row, 0, head), rotary_row_of(call, row, 0), plan->query_scale,
                    plan->queries + (row * call->heads + head) * call->head_dim);
}

static void decode_task(const AttentionPlan *plan, int64_t index)
{
    const AttentionCall *call = plan->call;
    int64_t kv_head = index % call->kv_heads, place = index / call->kv_heads, head_dim = call->head_dim;
    int64_t row = part_of(plan->ranges, call->batch, place), position = past_tokens(call, row);
    int64_t length = range_of(seen_keys(call, row));
    int64_t from = first_key(call, position) + (place - plan->ranges[row]) * length;
    float *out = plan->partials + place * call->heads * (head_dim + 2), *maximum = out + call->heads * head_dim;
    for (int64_t head = 0; head < plan->group; head += ROWS) {
        int64_t rows = min64(plan->group - head, ROWS), at = kv_head * plan->group + head;
        Range range = {.plan = plan,
                       .row = row,
                       .kv_head = kv_head,
                       .from = from,
                       .count = min64(length, position + 1 - from),
                       .query = plan->queries + (row * call->heads + at) * head_dim,
                       .out = out + at * head_dim,
                       .maximum = maximum + at,
                       .total = maximum + call->heads + at};
        ATTEND[rows - 1](&range);
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
        __m512 factor = exp2_lanes(_mm512_set1_ps(maxima[range * width] - maximum));
        total += _mm512_cvtss_f32(factor) * maxima[range * width + call->heads];
        for (int64_t d = 0; d < head_dim; d += LANES) {
            __mmask16 mask = lanes(head_dim - d);
            __m512 part = _mm512_maskz_loadu_ps(mask, partials + range * width + head * head_dim + d);
            _mm512_mask_storeu_ps(out + d, mask, _mm512_fmadd_ps(factor, part, _mm512_maskz_loadu_ps(mask, out + d)));
        }
    }
    for (int64_t d = 0; d < head_dim; d++)
        out[d] /= total;
}

static void decode_merge(const AttentionPlan *plan, int64_t row)
{
    for (int64_t head = 0; head < plan->call->heads; head++)
        merge(plan, row, head);
}

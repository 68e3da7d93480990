#include "vectors.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "attention_internal.h"
#include "exponential.h"
#include "../scratch.h"

/* Attention of sequences with several new tokens. A task takes TILE query rows of one key head (row by row; the heads of a token are adjacent)
 * over blocks of keys, with the online softmax of FlashAttention (Dao et al., 2022). Queries are transposed once, so
 * that keys and values are read in place: scores are [keys][rows], softmax runs along the lanes of a vector, and both
 * products are register tiles of 6 broadcast floats by up to 4 vectors. Blocks start at multiples of BLOCK from the
 * start of the cache, so the result of a row does not depend on the other rows. */
enum { TILE = 64, VECTORS = TILE / LANES, BLOCK = 96, BROADCASTS = 6, ENOUGH_TASKS = 16 };

typedef struct {
    float query[MAX_HEAD_DIM * TILE];   /* [head_dim][rows], rotated and scaled */
    float scores[BLOCK * TILE + LANES]; /* [keys][rows]; the last rows of a product read past the last key */
    float sums[(TILE + BROADCASTS) * MAX_HEAD_DIM]; /* [rows][head_dim] */
    float factor[TILE + LANES];                     /* rescales the sums so far to the new maximum */
    int32_t first[TILE], last[TILE];                /* the keys that a row attends to: first <= key < last */
    __m512 maximum[VECTORS], total[VECTORS];
} Tile;

/* scores[key][rows] of 6 keys and COUNT vectors of rows. */
INLINE void score_tile(const float *const *keys, const float *query, int64_t head_dim, float *scores, const int count)
{
    __m512 sum[BROADCASTS][VECTORS];
    UNROLL
    for (int k = 0; k < BROADCASTS; k++)
        UNROLL
        for (int v = 0; v < count; v++)
            sum[k][v] = _mm512_setzero_ps();
    for (int64_t d = 0; d < head_dim; d++) {
        __m512 q[VECTORS];
        UNROLL
        for (int v = 0; v < count; v++)
            q[v] = _mm512_load_ps(query + d * TILE + v * LANES);
        UNROLL
        for (int k = 0; k < BROADCASTS; k++) {
            __m512 key = _mm512_set1_ps(keys[k][d]);
            UNROLL
            for (int v = 0; v < count; v++)
                sum[k][v] = _mm512_fmadd_ps(key, q[v], sum[k][v]);
        }
    }
    UNROLL
    for (int k = 0; k < BROADCASTS; k++)
        UNROLL
        for (int v = 0; v < count; v++)
            _mm512_store_ps(scores + k * TILE + v * LANES, sum[k][v]);
}

/* sums[rows][columns] = factor * sums + scores' * values of ROWS rows and COUNT vectors of columns. */
INLINE void value_tile(const float *scores, const float *values, int64_t keys, int64_t head_dim, const float *factor,
                       float *sums, __mmask16 tail, const int rows, const int count)
{
    __m512 sum[BROADCASTS][VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        __m512 scale = _mm512_set1_ps(factor[r]);
        UNROLL
        for (int c = 0; c < count; c++)
            sum[r][c] = _mm512_mul_ps(
                scale, _mm512_maskz_loadu_ps(c == count - 1 ? tail : 0xffff, sums + r * head_dim + c * LANES));
    }
    for (int64_t k = 0; k < keys; k++) {
        __m512 value[VECTORS];
        UNROLL
        for (int c = 0; c < count; c++)
            value[c] = _mm512_maskz_loadu_ps(c == count - 1 ? tail : 0xffff, values + k * head_dim + c * LANES);
        UNROLL
        for (int r = 0; r < rows; r++) {
            __m512 score = _mm512_set1_ps(scores[k * TILE + r]);
            UNROLL
            for (int c = 0; c < count; c++)
                sum[r][c] = _mm512_fmadd_ps(score, value[c], sum[r][c]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < count; c++)
            _mm512_mask_storeu_ps(sums + r * head_dim + c * LANES, c == count - 1 ? tail : 0xffff, sum[r][c]);
}

static void prefill_scores(const float *const *keys, const float *query, int64_t head_dim, float *scores, int count)
{
    switch (count) {
    case 1: score_tile(keys, query, head_dim, scores, 1); break;
    case 2: score_tile(keys, query, head_dim, scores, 2); break;
    case 3: score_tile(keys, query, head_dim, scores, 3); break;
    default: score_tile(keys, query, head_dim, scores, 4);
    }
}

INLINE void prefill_values(const float *scores, const float *values, int64_t keys, int64_t head_dim,
                           const float *factor, float *sums, const int rows)
{
    for (int64_t column = 0; column < head_dim; column += VECTORS * LANES) {
        int64_t left = min64(head_dim - column, VECTORS * LANES);
        int count = (int)((left + LANES - 1) / LANES);
        __mmask16 tail = lanes(left - (count - 1) * LANES);
        const float *value = values + column;
        float *sum = sums + column;
        switch (count) {
        case 1: value_tile(scores, value, keys, head_dim, factor, sum, tail, rows, 1); break;
        case 2: value_tile(scores, value, keys, head_dim, factor, sum, tail, rows, 2); break;
        case 3: value_tile(scores, value, keys, head_dim, factor, sum, tail, rows, 3); break;
        default: value_tile(scores, value, keys, head_dim, factor, sum, tail, rows, 4);
        }
    }
}

static void add_six(const float *s, const float *v, int64_t keys, int64_t head_dim, const float *f, float *sums)
{
    prefill_values(s, v, keys, head_dim, f, sums, 6);
}

static void add_four(const float *s, const float *v, int64_t keys, int64_t head_dim, const float *f, float *sums)
{
    prefill_values(s, v, keys, head_dim, f, sums, 4);
}

/* 16 rows of 16 floats, `stride` apart, to columns, TILE apart. */
static void transpose(const float *from, int64_t stride, int64_t columns, float *to)
{
    __m512 a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++)
        a[i] = _mm512_maskz_loadu_ps(lanes(columns), from + i * stride);
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) { /* a[i + j]: channels j, j + 4, j + 8, j + 12 of rows i..i + 3 */
        a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int j = 0; j < 4; j++) {
        __m512 low = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88), high = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
        __m512 low2 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
        __m512 high2 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
        b[j] = _mm512_shuffle_f32x4(low, low2, 0x88);
        b[j + 8] = _mm512_shuffle_f32x4(low, low2, 0xdd);
        b[j + 4] = _mm512_shuffle_f32x4(high, high2, 0x88);
        b[j + 12] = _mm512_shuffle_f32x4(high, high2, 0xdd);
    }
    for (int i = 0; i < min64(columns, LANES); i++)
        _mm512_store_ps(to + i * TILE, b[i]);
}

/* Rotated, scaled and transposed queries of rows start..start + count, and the keys that each of them sees. */
static void load_queries(const AttentionPlan *plan, Tile *tile, int64_t row, int64_t kv_head, int64_t start, int count)
{
    const AttentionCall *call = plan->call;
    int64_t head_dim = call->head_dim, past = past_tokens(call, row);
    float *rotated = tile->sums; /* [16][head_dim]; the sums come later */
    for (int from = 0; from < TILE; from += LANES) {
        for (int r = from; r < from + LANES; r++) {
            tile->first[r] = tile->last[r] = 0;
            if (r >= count) {
                memset(rotated + (r - from) * head_dim, 0, (size_t)head_dim * sizeof(float));
                continue;
            }
            int64_t token = (start + r) / plan->group, head = kv_head * plan->group + (start + r) % plan->group;
            int64_t position = past + token;
            tile->first[r] = (int32_t)first_key(call, position);
            tile->last[r] = (int32_t)(position + 1);
            rotate_head(call, query_of(plan, row, token, head), rotary_row_of(call, row, token), plan->query_scale,
                        rotated + (r - from) * head_dim);
        }
        for (int64_t d = 0; d < head_dim; d += LANES)
            transpose(rotated + d, head_dim, head_dim - d, tile->query + d * TILE + from);
    }
}

/* Scores of keys start..end to powers of their own maximum, for one vector of rows. */
static void softmax_vector(Tile *tile, int vector, int64_t start, int64_t end, int64_t from, int64_t to, float cap)
{
    const __m512 none = _mm512_set1_ps(-INFINITY);
    float *scores = tile->scores + vector * LANES;
    const int32_t *first = tile->first + vector * LANES, *last = tile->last + vector * LANES;
    __m512i firsts = _mm512_loadu_si512(first), lasts = _mm512_loadu_si512(last);
    int64_t all_from = _mm512_reduce_max_epi32(firsts), all_to = _mm512_reduce_min_epi32(lasts);
    __m512 old = tile->maximum[vector], maximum = old;
    for (int64_t key = from; key < to; key++) {
        float *at = scores + (key - start) * TILE;
        __m512 score = _mm512_load_ps(at);
        int whole = key >= all_from && key < all_to;
        if (cap > 0)
            score = _mm512_mul_ps(tanh_lanes(score), _mm512_set1_ps(cap));
        if (!whole) {
            __m512i index = _mm512_set1_epi32((int32_t)key);
            __mmask16 seen = _mm512_cmple_epi32_mask(firsts, index) & _mm512_cmpgt_epi32_mask(lasts, index);
            score = _mm512_mask_blend_ps(seen, none, score);
        }
        if (cap > 0 || !whole)
            _mm512_store_ps(at, score);
        maximum = _mm512_max_ps(maximum, score);
    }
    __m512 factor = exp2_lanes(_mm512_sub_ps(old, maximum)), total = _mm512_mul_ps(tile->total[vector], factor);
    for (int64_t key = start; key < from; key++)
        _mm512_store_ps(scores + (key - start) * TILE, _mm512_setzero_ps());
    for (int64_t key = from; key < to; key++) {
        float *at = scores + (key - start) * TILE;
        __m512 power = exp2_lanes(_mm512_sub_ps(_mm512_load_ps(at), maximum));
        _mm512_store_ps(at, power);
        total = _mm512_add_ps(total, power);
    }
    for (int64_t key = to; key < end; key++)
        _mm512_store_ps(scores + (key - start) * TILE, _mm512_setzero_ps());
    tile->maximum[vector] = maximum;
    tile->total[vector] = total;
    _mm512_storeu_ps(tile->factor + vector * LANES, factor);
}

static const float ONES[BROADCASTS] = {1, 1, 1, 1, 1, 1}; /* the first run of a block has rescaled the sums */

/* One block of keys start..end, all of which some row of the tile sees. */
static void attend_block(const AttentionPlan *plan, Tile *tile, int64_t row_of_batch, int64_t kv_head, int64_t start,
                         int64_t end, int count)
{
    const float *keys = plan->call->present_key, *values = plan->call->present_value;
    int64_t head_dim = plan->call->head_dim, from[VECTORS], to[VECTORS];
    int used = (count + LANES - 1) / LANES;
    for (int v = 0; v < used; v++) {
        int row = (int)min64((v + 1) * LANES, count) - 1;
        from[v] = min64(end, max64(start, tile->first[v * LANES]));
        to[v] = max64(from[v], min64(end, tile->last[row]));
    }
    for (int64_t key = start; key < end; key += BROADCASTS) {
        int low = 0, high = used; /* the vectors of which some row sees some of these keys */
        while (low < high && to[low] <= key)
            low++;
        while (high > low && from[high - 1] >= key + BROADCASTS)
            high--;
        if (low == high)
            continue;
        const float *at[BROADCASTS];
        for (int k = 0; k < BROADCASTS; k++)
            at[k] = keys + place_of(plan, row_of_batch, kv_head, min64(key + k, end - 1));
        float *scores = tile->scores + (key - start) * TILE + low * LANES;
        prefill_scores(at, tile->query + low * LANES, head_dim, scores, high - low);
    }
    for (int v = 0; v < used; v++)
        softmax_vector(tile, v, start, end, from[v], to[v], plan->cap);
    for (int row = 0; row < count;) {
        int left = count - row, rows = left > 4 ? 6 : 4, end_row = (int)min64(row + rows, count) - 1;
        int64_t low = max64(start, tile->first[row]), high = min64(end, tile->last[end_row]);
        const float *factor = tile->factor + row;
        for (int64_t next; low < high; low = next, factor = ONES) {
            next = run_end(plan, low, high);
            const float *scores = tile->scores + (low - start) * TILE + row;
            const float *at = values + place_of(plan, row_of_batch, kv_head, low);
            (rows == 6 ? add_six : add_four)(scores, at, next - low, head_dim, factor, tile->sums + row * head_dim);
        }
        row += rows;
    }
}

static int64_t prefill_tiles(const AttentionCall *call, int64_t row, int64_t height)
{
    int64_t rows = new_tokens(call, row) * (call->heads / call->kv_heads);
    return (rows + height - 1) / height;
}

/* Chooses tiles that are low enough to occupy all threads, and counts them. */
static void prefill_plan(AttentionPlan *plan)
{
    const AttentionCall *call = plan->call;
    for (plan->height = TILE;; plan->height /= 2) {
        plan->tiles[0] = 0;
        for (int64_t row = 0; row < call->batch; row++)
            plan->tiles[row + 1]
                = plan->tiles[row] + (new_tokens(call, row) == 1 ? 0 : prefill_tiles(call, row, plan->height));
        if (plan->height == LANES || plan->tiles[call->batch] * call->kv_heads >= ENOUGH_TASKS)
            return;
    }
}

static void prefill_task(AttentionPlan *plan, int64_t index)
{
    const AttentionCall *call = plan->call;
    int64_t kv_head = index % call->kv_heads, place = index / call->kv_heads, head_dim = call->head_dim;
    int64_t row = part_of(plan->tiles, call->batch, place), rows = new_tokens(call, row) * plan->group;
    int64_t start = (plan->tiles[row + 1] - 1 - place) * plan->height; /* longest first */
    int count = (int)min64(plan->height, rows - start);
    Tile *tile = thread_scratch(OF_TASK, sizeof *tile); /* some 300 KB: too much for the stack of a musl thread */
    if (tile == NULL) {
        atomic_store(&plan->failed, true);
        return;
    }
    load_queries(plan, tile, row, kv_head, start, count);
    memset(tile->sums, 0, (size_t)((TILE + BROADCASTS) * head_dim) * sizeof(float));
    memset(tile->factor, 0, sizeof tile->factor);
    memset(tile->scores, 0, sizeof tile->scores); /* rows past the last one are computed, and not stored */
    for (int v = 0; v < VECTORS; v++) {
        tile->maximum[v] = _mm512_set1_ps(-0x1p+126f); /* finite: infinity minus infinity is NaN */
        tile->total[v] = _mm512_setzero_ps();
    }
    int64_t end = tile->last[count - 1];
    for (int64_t key = tile->first[0]; key < end;) {
        int64_t next = min64(end, key / BLOCK * BLOCK + BLOCK);
        attend_block(plan, tile, row, kv_head, key, next, count);
        key = next;
    }
    float totals[TILE];
    for (int v = 0; v < VECTORS; v++)
        _mm512_storeu_ps(totals + v * LANES, tile->total[v]);
    for (int r = 0; r < count; r++) {
        int64_t token = (start + r) / plan->group, head = kv_head * plan->group + (start + r) % plan->group;
        float *out = out_of(call, row, token, head);
        const __m512 share = _mm512_set1_ps(1.0f / totals[r]);
        for (int64_t d = 0; d < head_dim; d += LANES) {
            __mmask16 mask = lanes(head_dim - d);
            __m512 sum = _mm512_maskz_loadu_ps(mask, tile->sums + r * head_dim + d);
            _mm512_mask_storeu_ps(out + d, mask, _mm512_mul_ps(sum, share));
        }
    }
}

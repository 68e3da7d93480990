#include "vectors.h"

#include <stdbool.h>
#include <string.h>

#include "attention_internal.h"
#include "exponential.h"
#include "../scratch.h"

/* A task of attention in vectors: its query rows over blocks of keys. Queries are transposed once, so
 * that keys and values are read in place: scores are [keys][rows], softmax runs along the lanes of a vector, and both
 * products are register tiles of 6 broadcast floats by up to 4 vectors. Blocks start at multiples of BLOCK from the
 * start of the cache, so the result of a row does not depend on the other rows. */
enum { BROADCASTS = 6 };

typedef struct {
    QueryRows rows;
    float query[MAX_HEAD_DIM * TILE];   /* [head_dim][rows], rotated and scaled */
    float scores[BLOCK * TILE + LANES]; /* [keys][rows]; the last rows of a product read past the last key */
    float sums[(TILE + BROADCASTS) * MAX_HEAD_DIM]; /* [rows][head_dim] */
    float factor[TILE + LANES];                     /* rescales the sums so far to the new maximum */
    float wide[BLOCK * MAX_HEAD_DIM]; /* the keys of a block, then its values, as floats */
} Tile;

/* scores[key][rows] of 6 keys and COUNT vectors of rows. */
INLINE void score_tile(const float *const *keys, const float *query, int64_t head_dim, float *scores, const int count)
{
    F16 sum[BROADCASTS][TILE_VECTORS];
    UNROLL
    for (int k = 0; k < BROADCASTS; k++)
        UNROLL
        for (int v = 0; v < count; v++)
            sum[k][v] = floats(0);
    for (int64_t d = 0; d < head_dim; d++) {
        F16 q[TILE_VECTORS];
        UNROLL
        for (int v = 0; v < count; v++)
            q[v] = load(query + d * TILE + v * LANES);
        UNROLL
        for (int k = 0; k < BROADCASTS; k++) {
            const F16 key = floats(keys[k][d]);
            UNROLL
            for (int v = 0; v < count; v++)
                sum[k][v] = mul_add(key, q[v], sum[k][v]);
        }
    }
    UNROLL
    for (int k = 0; k < BROADCASTS; k++)
        UNROLL
        for (int v = 0; v < count; v++)
            store(scores + k * TILE + v * LANES, sum[k][v]);
}

/* sums[rows][columns] = factor * sums + scores' * values of ROWS rows and COUNT vectors of columns; if not WHOLE, of one
 * vector with `left` of them. */
INLINE void value_tile(const float *scores, const float *values, int64_t keys, int64_t head_dim, const float *factor,
                       float *sums, int64_t left, const int rows, const int count, const bool whole)
{
    F16 sum[BROADCASTS][TILE_VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        const F16 scale = floats(factor[r]);
        UNROLL
        for (int c = 0; c < count; c++)
            sum[r][c] = mul(scale, load_up_to(whole, sums + r * head_dim + c * LANES, left));
    }
    for (int64_t k = 0; k < keys; k++) {
        F16 value[TILE_VECTORS];
        UNROLL
        for (int c = 0; c < count; c++)
            value[c] = load_up_to(whole, values + k * head_dim + c * LANES, left);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const F16 score = floats(scores[k * TILE + r]);
            UNROLL
            for (int c = 0; c < count; c++)
                sum[r][c] = mul_add(score, value[c], sum[r][c]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < count; c++)
            store_up_to(whole, sums + r * head_dim + c * LANES, left, sum[r][c]);
}

static void prefill_scores(const float *const *keys, const float *query, int64_t head_dim, float *scores, int count)
{
    for (int v = 0; v < count; v += TILE_VECTORS) {
        const float *q = query + v * LANES;
        float *to = scores + v * LANES;
        if (count - v >= TILE_VECTORS)
            score_tile(keys, q, head_dim, to, TILE_VECTORS);
#if TILE_VECTORS > 1
        else if (count - v == 3)
            score_tile(keys, q, head_dim, to, 3);
        else if (count - v == 2)
            score_tile(keys, q, head_dim, to, 2);
        else
            score_tile(keys, q, head_dim, to, 1);
#endif
    }
}

INLINE void prefill_values(const float *scores, const float *values, int64_t keys, int64_t head_dim,
                           const float *factor, float *sums, const int rows)
{
    for (int64_t column = 0, count; column < head_dim; column += count * LANES) {
        const int64_t left = head_dim - column;
        const float *value = values + column;
        float *sum = sums + column;
        count = max64(1, min64(left / LANES, TILE_VECTORS));
        if (left < LANES)
            value_tile(scores, value, keys, head_dim, factor, sum, left, rows, 1, false);
        else if (count == TILE_VECTORS)
            value_tile(scores, value, keys, head_dim, factor, sum, LANES, rows, TILE_VECTORS, true);
#if TILE_VECTORS > 1
        else if (count == 3)
            value_tile(scores, value, keys, head_dim, factor, sum, LANES, rows, 3, true);
        else if (count == 2)
            value_tile(scores, value, keys, head_dim, factor, sum, LANES, rows, 2, true);
        else
            value_tile(scores, value, keys, head_dim, factor, sum, LANES, rows, 1, true);
#endif
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

/* 16 rows of floats, `stride` apart, to columns, TILE apart. */
static void transpose_rows(const float *from, int64_t stride, int64_t columns, float *to)
{
    F16 v[LANES];
    for (int i = 0; i < LANES; i++)
        v[i] = load_some(from + i * stride, columns);
    transpose(v);
    for (int i = 0; i < min64(columns, LANES); i++)
        store(to + i * TILE, v[i]);
}

/* Rotated, scaled and transposed queries. */
static void load_queries(const AttentionPlan *plan, Tile *tile)
{
    int64_t head_dim = plan->call->head_dim;
    float *rotated = tile->sums; /* [16][head_dim]; the sums come later */
    for (int from = 0; from < tile->rows.count; from += LANES) {
        rotate_rows(plan, &tile->rows, from, rotated);
        for (int64_t d = 0; d < head_dim; d += LANES)
            transpose_rows(rotated + d, head_dim, head_dim - d, tile->query + d * TILE + from);
    }
}

/* Scores of keys start..end to powers of their own maximum, for one vector of rows. */
static void softmax_vector(Tile *tile, int vector, int64_t start, int64_t end, int64_t from, int64_t to, float cap)
{
    float *scores = tile->scores + vector * LANES;
    const F16 old = tile->rows.maximum[vector];
    F16 maximum = old;
    for (int64_t key = from; key < to; key++) {
        float *at = scores + (key - start) * TILE;
        const F16 score = seen_score(&tile->rows, vector, key, load(at), cap);
        if (cap > 0 || !all_see(&tile->rows, vector, key))
            store(at, score);
        maximum = larger(maximum, score);
    }
    const F16 factor = exp2_lanes(sub(old, maximum));
    F16 total = mul(tile->rows.total[vector], factor);
    for (int64_t key = start; key < from; key++)
        store(scores + (key - start) * TILE, floats(0));
    for (int64_t key = from; key < to; key++) {
        float *at = scores + (key - start) * TILE;
        const F16 power = exp2_lanes(sub(load(at), maximum));
        store(at, power);
        total = add(total, power);
    }
    for (int64_t key = to; key < end; key++)
        store(scores + (key - start) * TILE, floats(0));
    tile->rows.maximum[vector] = maximum;
    tile->rows.total[vector] = total;
    store(tile->factor + vector * LANES, factor);
}

static const float ONES[BROADCASTS] = {1, 1, 1, 1, 1, 1}; /* the first run of a block has rescaled the sums */

INLINE void widen_cache(const CacheType type, const void *from, int64_t count, float *to)
{
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(to + i, load_cached(type, from, i, true, LANES));
    if (i < count)
        store_some(to + i, count - i, load_cached(type, from, i, false, count - i));
}

/* Positions start..end of a cache, in floats: as they lie, or widened to follow one another. A place in them is that of
 * float_at. */
static const float *floats_of(const AttentionPlan *plan, Tile *tile, const void *cache, int64_t row, int64_t kv_head,
                              int64_t start, int64_t end)
{
    const CacheType type = plan->call->cache_type;
    int64_t head_dim = plan->call->head_dim;
    if (type == CACHE_FLOAT)
        return cache;
    for (int64_t position = start, next; position < end; position = next) {
        next = run_end(plan, position, end);
        const void *from = cache_at(plan->call, cache, place_of(plan, row, kv_head, position));
        float *to = tile->wide + (position - start) * head_dim;
        if (type == CACHE_HALF)
            widen_cache(CACHE_HALF, from, (next - position) * head_dim, to);
        else
            widen_cache(CACHE_INT8, from, (next - position) * head_dim, to);
    }
    return tile->wide;
}

static int64_t float_at(const AttentionPlan *plan, int64_t row, int64_t kv_head, int64_t start, int64_t position)
{
    const bool as_they_lie = plan->call->cache_type == CACHE_FLOAT;
    return as_they_lie ? place_of(plan, row, kv_head, position) : (position - start) * plan->call->head_dim;
}

/* One block of keys start..end, all of which some row of the tile sees. */
static void attend_block(const AttentionPlan *plan, Tile *tile, int64_t start, int64_t end)
{
    const QueryRows *rows = &tile->rows;
    const float *keys = floats_of(plan, tile, plan->call->present_key, rows->row, rows->kv_head, start, end);
    int64_t head_dim = plan->call->head_dim, from[VECTORS], to[VECTORS];
    int used = rows->used;
    for (int v = 0; v < used; v++)
        find_seen(rows, v, start, end, from + v, to + v);
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
            at[k] = keys + float_at(plan, rows->row, rows->kv_head, start, min64(key + k, end - 1));
        float *scores = tile->scores + (key - start) * TILE + low * LANES;
        prefill_scores(at, tile->query + low * LANES, head_dim, scores, high - low);
    }
    for (int v = 0; v < used; v++)
        softmax_vector(tile, v, start, end, from[v], to[v], plan->cap);
    const float *values = floats_of(plan, tile, plan->call->present_value, rows->row, rows->kv_head, start, end);
    for (int row = 0; row < rows->count;) {
        int left = rows->count - row, some = left > 4 ? 6 : 4, end_row = (int)min64(row + some, rows->count) - 1;
        int64_t low = max64(start, rows->first[row]), high = min64(end, rows->last[end_row]);
        const float *factor = tile->factor + row;
        for (int64_t next; low < high; low = next, factor = ONES) {
            next = plan->call->cache_type != CACHE_FLOAT ? high : run_end(plan, low, high);
            const float *scores = tile->scores + (low - start) * TILE + row;
            const float *at = values + float_at(plan, rows->row, rows->kv_head, start, low);
            (some == 6 ? add_six : add_four)(scores, at, next - low, head_dim, factor, tile->sums + row * head_dim);
        }
        row += some;
    }
}

static void prefill_task(AttentionPlan *plan, int64_t index)
{
    const AttentionCall *call = plan->call;
    int64_t head_dim = call->head_dim;
    Tile *tile = thread_scratch(OF_TASK, sizeof *tile); /* some 500 KB: too much for the stack of a musl thread */
    if (tile == NULL) {
        atomic_store(&plan->failed, true);
        return;
    }
    QueryRows *rows = &tile->rows;
    find_rows(plan, index, rows);
    if (rows->count == 0)
        return;
    load_queries(plan, tile);
    memset(tile->sums, 0, (size_t)((TILE + BROADCASTS) * head_dim) * sizeof(float));
    memset(tile->factor, 0, sizeof tile->factor);
    memset(tile->scores, 0, sizeof tile->scores); /* rows past the last one are computed, and not stored */
    int64_t end = rows->last[rows->count - 1];
    for (int64_t key = rows->first[0]; key < end;) {
        int64_t next = min64(end, key / BLOCK * BLOCK + BLOCK);
        attend_block(plan, tile, key, next);
        key = next;
    }
    float totals[TILE];
    for (int v = 0; v < rows->used; v++)
        store(totals + v * LANES, rows->total[v]);
    for (int r = 0; r < rows->count; r++) {
        float *out = out_of(call, rows->row, token_of(rows, r), head_of(rows, r));
        const F16 share = floats(1.0f / totals[r]);
        for (int64_t d = 0; d < head_dim; d += LANES) {
            const F16 sum = load_some(tile->sums + r * head_dim + d, head_dim - d);
            store_some(out + d, head_dim - d, mul(sum, share));
        }
        if (is_int8(call))
            scale_channels(head_dim, call->value_scale + rows->kv_head * head_dim, out);
    }
}

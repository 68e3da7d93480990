/* Shared by the attention files. */
#ifndef SATCHEL_ATTENTION_INTERNAL_H
#define SATCHEL_ATTENTION_INTERNAL_H

#include "vectors.h"

#include <stdatomic.h>

#include "../attention.h"

enum { MAX_HEAD_DIM = 512 }; /* bounds the scratch memory of a tile */

/* A call, and values derived from it. Position p of a sequence is at p & mask of block table[row][p >> shift]; a dense
 * cache has one block for each row. */
typedef struct {
    const AttentionCall *call;
    int64_t group;                 /* query heads to a key head */
    const float *key, *value;      /* of the first token */
    int64_t query_width, kv_width; /* floats from a token to the next */
    float query_scale;             /* on queries: scores are exponents of two, or fractions of the softcap */
    float cap;                     /* softcap in exponents of two; 0: none */
    const int32_t *table;
    int64_t table_width;
    int shift;
    int64_t *ranges; /* [batch + 1]: ranges of keys of the sequences before, of those with one new token */
    int64_t *tiles;  /* [batch + 1]: the same of tiles of queries, of those with several new tokens */
    int64_t height;  /* query rows of a tile */
    float *queries;  /* [batch, heads, head_dim]: rotated and scaled, of single tokens */
    float *partials; /* [ranges, heads, head_dim + 2]: weighted values, maximum, sum */
    atomic_bool failed; /* a thread had no scratch memory */
} AttentionPlan;

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Where a sequence's new tokens begin in the row of all. */
static inline int64_t first_token(const AttentionCall *call, int64_t row)
{
    return call->row_offsets ? call->row_offsets[row] : row * call->tokens;
}

static inline int64_t new_tokens(const AttentionCall *call, int64_t row)
{
    return call->row_offsets ? call->row_offsets[row + 1] - call->row_offsets[row] : call->tokens;
}

/* Tokens in the cache before this step. */
static inline int64_t past_tokens(const AttentionCall *call, int64_t row)
{
    bool empty = !call->row_offsets && call->tokens == call->total;
    return empty ? 0 : (int64_t)call->seqlens_k[row] + 1 - new_tokens(call, row);
}

/* First key that the token at `position` attends to. */
static inline int64_t first_key(const AttentionCall *call, int64_t position)
{
    return call->window > 0 ? max64(0, position + 1 - call->window) : 0;
}

static inline bool is_int8(const AttentionCall *call) { return call->cache_type == CACHE_INT8; }

/* Bytes of an element of a cache. */
INLINE int64_t element_bytes(const CacheType type)
{
    return type == CACHE_FLOAT ? (int64_t)sizeof(float) : type == CACHE_HALF ? 2 : 1;
}

/* The memory of a cache from an element on. */
static inline void *cache_at(const AttentionCall *call, const void *cache, int64_t element)
{
    return (char *)cache + element * element_bytes(call->cache_type);
}

/* 16 elements of a cache as they are stored; if not `whole`, the first `left` of them, and zeros. */
INLINE F16 load_cached(const CacheType type, const void *cache, int64_t element, const bool whole, int64_t left)
{
    const int8_t *byte = (const int8_t *)cache + element;
    const uint16_t *half = (const uint16_t *)cache + element;
    if (type == CACHE_INT8)
        return to_floats(whole ? load_signed(byte) : load_signed_some(byte, left));
    if (type == CACHE_HALF)
        return whole ? load_halves(half) : load_some_halves(half, left);
    return load_up_to(whole, (const float *)cache + element, left);
}

/* The query heads of a key head that are wanted: from the first to in front of the last. */
static inline int64_t first_head(const AttentionPlan *plan, int64_t kv_head)
{
    return max64(plan->call->first_head, kv_head * plan->group);
}
static inline int64_t last_head(const AttentionPlan *plan, int64_t kv_head)
{
    return min64(plan->call->first_head + plan->call->own_heads, (kv_head + 1) * plan->group);
}

/* Where a position of a sequence is in a cache of keys or values, in elements: the same for both. */
static inline int64_t place_of(const AttentionPlan *plan, int64_t row, int64_t kv_head, int64_t position)
{
    const AttentionCall *call = plan->call;
    int64_t block = plan->table[row * plan->table_width + (position >> plan->shift)];
    int64_t within = position & (((int64_t)1 << plan->shift) - 1);
    return ((block * call->kv_heads + kv_head) * call->capacity + within) * call->head_dim;
}

/* The end of the positions up to `end` that follow `position` in memory. */
static inline int64_t run_end(const AttentionPlan *plan, int64_t position, int64_t end)
{
    return min64(end, ((position >> plan->shift) + 1) << plan->shift);
}

static inline const float *query_of(const AttentionPlan *plan, int64_t row, int64_t token, int64_t head)
{
    const AttentionCall *call = plan->call;
    return call->query + (first_token(call, row) + token) * plan->query_width + head * call->head_dim;
}

/* x[d] *= scale[d] of one head's channels. */
static inline void scale_channels(int64_t head_dim, const float *scale, float *x)
{
    for (int64_t d = 0; d < head_dim; d++)
        x[d] *= scale[d];
}

static inline float *out_of(const AttentionCall *call, int64_t row, int64_t token, int64_t head)
{
    return call->out + ((first_token(call, row) + token) * call->own_heads + head - call->first_head) * call->head_dim;
}

/* The row of the rotary tables that a new token has. */
static inline int64_t rotary_row_of(const AttentionCall *call, int64_t row, int64_t token)
{
    return call->rotary_row ? call->rotary_row[first_token(call, row) + token] : past_tokens(call, row) + token;
}

/* The row whose part holds `index`: starts[row] <= index < starts[row + 1]. */
static inline int64_t part_of(const int64_t *starts, int64_t rows, int64_t index)
{
    int64_t low = 0, high = rows;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (starts[middle] <= index)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* A query, rotated and scaled: its products with keys as they are stored are scores. */
static void rotate_query(const AttentionPlan *plan, int64_t row, int64_t token, int64_t head, float *out);

/* Writes the new tokens from..to of a row and key head to the cache. */
static void append_tokens(const AttentionPlan *plan, int64_t row, int64_t kv_head, int64_t from, int64_t to);

/* Prefill: sequences with several new tokens. `index` counts tiles of all key heads. */
static int64_t prefill_tiles(const AttentionCall *call, int64_t row, int64_t height);
static void prefill_plan(AttentionPlan *plan);
static void prefill_task(AttentionPlan *plan, int64_t index);

/* Decode: sequences with one new token. `index` counts ranges of all key heads. */
static int64_t decode_ranges(const AttentionCall *call, int64_t row);
static int64_t decode_work(const AttentionCall *call, int64_t row);
static void decode_queries(const AttentionPlan *plan, int64_t row, int64_t kv_head);
static void decode_task(const AttentionPlan *plan, int64_t index);
static void decode_merge(const AttentionPlan *plan, int64_t row);

#endif

/* satchel:Attention without ONNX Runtime: causal, grouped heads, rotary embedding, KV cache written in place. */
#ifndef SATCHEL_ATTENTION_H
#define SATCHEL_ATTENTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "parallel.h"

/* How keys and values are stored. In int8 they stand for their products with scales. */
typedef enum { CACHE_FLOAT, CACHE_HALF, CACHE_INT8 } CacheType;

/* One step. All tensors are dense, and those of floats float32, but for the cache; a token's channels lie head by head. */
typedef struct {
    int64_t batch, tokens, heads, kv_heads, head_dim; /* sequences, and new tokens of each; ragged: of all together */
    int64_t first_head, own_heads; /* of the query heads, those that are wanted; at least one of each key head */
    const int32_t *row_offsets; /* [batch + 1]: ragged: where each sequence's new tokens begin, and their number; NULL:
                                 * each sequence has as many */
    const int32_t *block_table; /* ragged: [batch, table_width]: which block has each `capacity` positions of a
                                 * sequence; those that no new token sees or is written to are not read */
    int64_t table_width, blocks;
    const float *query; /* [batch, tokens, heads * head_dim]; packed: [.., (heads + 2 * kv_heads) * head_dim] */
    const float *key;   /* [batch, tokens, kv_heads * head_dim]; packed: NULL, and so is value */
    const float *value;
    CacheType cache_type;   /* of past and present */
    const float *key_scale; /* [kv_heads, head_dim]: of a cache in int8; otherwise NULL, and so is value_scale */
    const float *value_scale;
    const void *past_key; /* [batch, kv_heads, past_capacity, head_dim]: the present's own memory,
                           * with the same capacity, or memory apart. Ragged: [blocks, ..], the present's own */
    const void *past_value;
    int64_t past_capacity;
    void *present_key; /* [batch, kv_heads, capacity, head_dim]; the new tokens' keys and values are written to it */
    void *present_value;
    int64_t capacity; /* ragged: a power of two */
    bool one_cache; /* past and present have one row: the rows of the batch are single tokens of one sequence, each of
                     * which sees those before it; past and present are the same memory */
    const int32_t *seqlens_k; /* [batch]: tokens in the cache after this step, minus one */
    int32_t total;            /* equal to tokens: the cache was empty in all rows; ragged: not read */
    const float *cos, *sin;   /* [rotary_rows, rotary_half]; NULL: no rotation */
    int64_t rotary_rows, rotary_half;
    const int64_t *rotary_row; /* [batch, tokens]: which row each new token has; NULL: that of its position */
    int interleaved; /* channels 2i and 2i + 1 rotate together, not i and i + rotary_half */
    float scale;     /* 0: 1 / sqrt(head_dim) */
    float softcap;   /* 0: none */
    int64_t window;  /* a token attends to itself and window - 1 before it; below 1: to all before it */
    float *out;      /* [batch, tokens, own_heads * head_dim] */
} AttentionCall;

#endif

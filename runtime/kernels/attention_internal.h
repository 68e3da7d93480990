/* Shared by the attention files. */
#ifndef SATCHEL_ATTENTION_INTERNAL_H
#define SATCHEL_ATTENTION_INTERNAL_H

#include "vectors.h"

#include "attention.h"

enum { MAX_HEAD_DIM = 512 }; /* bounds the scratch memory of a tile */

/* A call, and values derived from it. */
typedef struct {
    const AttentionCall *call;
    int64_t group;                 /* query heads to a key head */
    const float *key, *value;      /* of the first token */
    int64_t query_width, kv_width; /* floats from a token to the next */
    float query_scale;             /* on queries: scores are exponents of two, or fractions of the softcap */
    float cap;                     /* softcap in exponents of two; 0: none */
    char *scratch;
} AttentionPlan;

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Tokens in the cache before this step. */
static inline int64_t past_tokens(const AttentionCall *call, int64_t row)
{
    return call->tokens == call->total ? 0 : (int64_t)call->seqlens_k[row] + 1 - call->tokens;
}

/* First key that the token at `position` attends to. */
static inline int64_t first_key(const AttentionCall *call, int64_t position)
{
    return call->window > 0 ? max64(0, position + 1 - call->window) : 0;
}

static inline float *cache_of(const AttentionCall *call, float *cache, int64_t row, int64_t kv_head)
{
    return cache + ((call->one_cache ? 0 : row) * call->kv_heads + kv_head) * call->capacity * call->head_dim;
}

static inline const float *query_of(const AttentionPlan *plan, int64_t row, int64_t token, int64_t head)
{
    const AttentionCall *call = plan->call;
    return call->query + (row * call->tokens + token) * plan->query_width + head * call->head_dim;
}

static inline float *out_of(const AttentionCall *call, int64_t row, int64_t token, int64_t head)
{
    return call->out + ((row * call->tokens + token) * call->heads + head) * call->head_dim;
}

/* The row of the rotary tables that a new token has. */
static inline int64_t rotary_row_of(const AttentionCall *call, int64_t row, int64_t token)
{
    return call->rotary_row ? call->rotary_row[row * call->tokens + token] : past_tokens(call, row) + token;
}

/* One head's channels, rotated by row `at` of the tables and multiplied by `scale`. */
void rotate_head(const AttentionCall *call, const float *head, int64_t at, float scale, float *out);

/* Writes the new tokens from..to of a row and key head to the cache. */
void append_tokens(const AttentionPlan *plan, int64_t row, int64_t kv_head, int64_t from, int64_t to);

const char *prefill_run(const AttentionPlan *plan, const Parallel *parallel);
size_t decode_scratch(const AttentionCall *call);
void decode_run(const AttentionPlan *plan, const Parallel *parallel);

#endif

#include "vectors.h"

#include <math.h>
#include <string.h>

#include "attention_internal.h"

static const char *check_sizes(const AttentionCall *call)
{
    if (call->batch < 1 || call->tokens < 1 || call->heads < 1 || call->kv_heads < 1 || call->head_dim < 1)
        return "satchel:Attention: a size of the query is zero";
    if (call->head_dim > MAX_HEAD_DIM)
        return "satchel:Attention: the head size exceeds 512";
    if (call->heads % call->kv_heads)
        return "satchel:Attention: the number of query heads is not a multiple of the key heads";
    if (!call->key != !call->value)
        return "satchel:Attention: give both key and value, or pack both into the query";
    if (call->past_capacity < 0 || call->capacity < 1)
        return "satchel:Attention: the cache has no positions";
    if (call->past_capacity > 0 && (!call->past_key || !call->past_value))
        return "satchel:Attention: the past is missing";
    if (!call->cos != !call->sin)
        return "satchel:Attention: give both cos and sin, or neither";
    if (call->cos && (call->rotary_half < 1 || 2 * call->rotary_half > call->head_dim || call->rotary_rows < 1))
        return "satchel:Attention: the rotary tables do not fit the head size";
    if (!isfinite(call->scale) || !isfinite(call->softcap) || call->softcap < 0)
        return "satchel:Attention: scale and softcap must be finite, and softcap not negative";
    return NULL;
}

static const char *check_positions(const AttentionCall *call)
{
    if (call->total < call->tokens)
        return "satchel:Attention: total_sequence_length is below the number of new tokens";
    if (call->total > call->capacity)
        return "satchel:Attention: total_sequence_length is beyond the cache's capacity";
    if (call->one_cache && call->tokens > 1)
        return "satchel:Attention: rows that have one cache are single tokens";
    if (call->tokens > 1 && call->tokens != call->total && call->batch != 1)
        return "satchel:Attention: several new tokens with a past need batch size 1";
    for (int64_t row = 0; row < call->batch; row++) {
        if (call->seqlens_k[row] < 0 || call->seqlens_k[row] >= call->total)
            return "satchel:Attention: seqlens_k is not within total_sequence_length";
        int64_t past = past_tokens(call, row);
        if (past < 0)
            return "satchel:Attention: seqlens_k is below the number of new tokens";
        if (past > call->past_capacity)
            return "satchel:Attention: seqlens_k is beyond the past's capacity";
        if (call->cos && !call->rotary_row && past + call->tokens > call->rotary_rows)
            return "satchel:Attention: a position is beyond the rotary tables";
    }
    for (int64_t i = 0; call->cos && call->rotary_row && i < call->batch * call->tokens; i++)
        if (call->rotary_row[i] < 0 || call->rotary_row[i] >= call->rotary_rows)
            return "satchel:Attention: a position is beyond the rotary tables";
    return NULL;
}

const char *attention_check(const AttentionCall *call, size_t *scratch)
{
    *scratch = 0;
    const char *problem = check_sizes(call);
    if (!problem)
        problem = check_positions(call);
    if (!problem && call->tokens == 1)
        *scratch = decode_scratch(call);
    return problem;
}

static AttentionPlan make_plan(const AttentionCall *call, void *scratch)
{
    const float log2e = 0x1.715476p+0f;
    float scale = call->scale == 0.0f ? 1.0f / sqrtf((float)call->head_dim) : call->scale;
    AttentionPlan plan = {.call = call, .group = call->heads / call->kv_heads, .scratch = scratch};
    plan.key = call->key ? call->key : call->query + call->heads * call->head_dim;
    plan.value = call->key ? call->value : call->query + (call->heads + call->kv_heads) * call->head_dim;
    plan.kv_width = (call->key ? call->kv_heads : call->heads + 2 * call->kv_heads) * call->head_dim;
    plan.query_width = call->key ? call->heads * call->head_dim : plan.kv_width;
    plan.query_scale = call->softcap > 0 ? scale / call->softcap : scale * log2e;
    plan.cap = call->softcap * log2e;
    return plan;
}

static void copy_side(const AttentionCall *call, const float *past, float *present, size_t index)
{
    if (past == present)
        return;
    int64_t row = (int64_t)index / call->kv_heads, count = past_tokens(call, row), end = count + call->tokens;
    size_t bytes = (size_t)call->head_dim * sizeof(float);
    float *to = present + (int64_t)index * call->capacity * call->head_dim;
    if (count)
        memcpy(to, past + (int64_t)index * call->past_capacity * call->head_dim, (size_t)count * bytes);
    memset(to + end * call->head_dim, 0, (size_t)(call->capacity - end) * bytes);
}

/* Copies the past of one row and key head to the present, followed by zeros, unless they share memory. */
static void copy_past(void *data, size_t index)
{
    const AttentionCall *call = data;
    copy_side(call, call->past_key, call->present_key, index);
    copy_side(call, call->past_value, call->present_value, index);
}

const char *attention_run(const AttentionCall *call, void *scratch, const Parallel *parallel)
{
    AttentionPlan plan = make_plan(call, scratch);
    if (call->past_key != call->present_key || call->past_value != call->present_value)
        parallel_for(parallel, (size_t)(call->batch * call->kv_heads), copy_past, (void *)call);
    if (call->tokens == 1)
        return decode_run(&plan, parallel), NULL;
    return prefill_run(&plan, parallel);
}

#include "vectors.h"

#include <math.h>
#include <string.h>

#include "attention_internal.h"

static const char *check_sizes(const AttentionCall *call)
{
    if (call->batch < 1 || call->tokens < 1 || call->heads < 1 || call->kv_heads < 1 || call->head_dim < 1)
        return "satchel:Attention: a size of the query is zero";
    if (call->head_dim > MOST_HEAD_DIM)
        return "satchel:Attention: heads are wider than 512 channels";
    if (call->heads % call->kv_heads)
        return "satchel:Attention: the query heads cannot be shared out over the key heads";
    if (!call->key != !call->value)
        return "satchel:Attention: key and value must both be there, or both be in the query";
    if (call->past_capacity < 0 || call->capacity < 1)
        return "satchel:Attention: the cache has no positions";
    if (call->past_capacity > 0 && (!call->past_key || !call->past_value))
        return "satchel:Attention: the past is not there";
    if (!call->cos != !call->sin)
        return "satchel:Attention: cos and sin must both be there, or both be absent";
    if (call->cos && (call->rotary_half < 1 || 2 * call->rotary_half > call->head_dim || call->rotary_rows < 1))
        return "satchel:Attention: the rotation's tables do not fit the heads";
    if (!isfinite(call->scale) || !isfinite(call->softcap) || call->softcap < 0)
        return "satchel:Attention: scale and softcap must be finite numbers, and softcap not below zero";
    return NULL;
}

static const char *check_positions(const AttentionCall *call)
{
    if (call->total < call->tokens)
        return "satchel:Attention: total_sequence_length is below the number of new tokens";
    if (call->total > call->capacity)
        return "satchel:Attention: total_sequence_length is beyond the cache's capacity";
    if (call->tokens > 1 && call->tokens != call->total && call->batch != 1)
        return "satchel:Attention: several new tokens over a past need a batch of one";
    for (int64_t row = 0; row < call->batch; row++) {
        if (call->seqlens_k[row] < 0 || call->seqlens_k[row] >= call->total)
            return "satchel:Attention: seqlens_k is not within total_sequence_length";
        int64_t past = past_tokens(call, row);
        if (past < 0)
            return "satchel:Attention: seqlens_k is below the number of new tokens";
        if (past > call->past_capacity)
            return "satchel:Attention: seqlens_k is beyond the past's capacity";
        if (call->cos && past + call->tokens > call->rotary_rows)
            return "satchel:Attention: a position is beyond the rotation's tables";
    }
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

/* The past of one row and key head into the present, and zeros behind it, where they are not the same memory. */
static void copy_past(void *data, size_t index)
{
    const AttentionCall *call = data;
    copy_side(call, call->past_key, call->present_key, index);
    copy_side(call, call->past_value, call->present_value, index);
}

void attention_run(const AttentionCall *call, void *scratch, const Parallel *parallel)
{
    AttentionPlan plan = make_plan(call, scratch);
    if (call->past_key != call->present_key || call->past_value != call->present_value)
        parallel_for(parallel, (size_t)(call->batch * call->kv_heads), copy_past, (void *)call);
    if (call->tokens == 1)
        decode_run(&plan, parallel);
    else
        prefill_run(&plan, parallel);
}

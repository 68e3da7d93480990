#include "vectors.h"

#include <math.h>
#include <string.h>

#include "attention_internal.h"
#include "../ragged.h"

enum {
    MIN_BLOCK = 16,
    WHOLE = 62,      /* the shift of a dense cache: all positions are in one block */
    APPENDED = 64,   /* new tokens of a task that appends */
    MERGED = 8,      /* sequences of a task that merges */
    FEW = 16,        /* tokens or sequences that are appended or merged on this thread */
    ALONE = 1 << 15, /* the same of multiplications of attention */
};

static const char *check_sizes(const AttentionCall *call)
{
    if (call->batch < 1 || call->tokens < 1 || call->heads < 1 || call->kv_heads < 1 || call->head_dim < 1)
        return "satchel:Attention: a size of the query is zero";
    if (call->head_dim > MAX_HEAD_DIM)
        return "satchel:Attention: the head size exceeds 512";
    if (call->heads % call->kv_heads)
        return "satchel:Attention: the number of query heads is not a multiple of the key heads";
    if (call->first_head < 0 || call->own_heads < 1 || call->own_heads > call->heads - call->first_head)
        return "satchel:Attention: the heads that are wanted are not among the query heads";
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

static const char *check_dense(const AttentionCall *call)
{
    if (call->total < call->tokens)
        return "satchel:Attention: total_sequence_length is below the number of new tokens";
    if (call->total > call->capacity)
        return "satchel:Attention: total_sequence_length is beyond the cache's capacity";
    if (call->one_cache && call->tokens > 1)
        return "satchel:Attention: rows that have one cache are single tokens";
    if (call->tokens > 1 && call->tokens != call->total && call->batch != 1)
        return "satchel:Attention: several new tokens with a past need batch size 1";
    for (int64_t row = 0; row < call->batch; row++)
        if (call->seqlens_k[row] >= call->total)
            return "satchel:Attention: seqlens_k is not within total_sequence_length";
    return NULL;
}

/* The blocks that a sequence's new tokens see or are written to. */
static const char *check_blocks(const AttentionCall *call, int64_t row)
{
    int64_t last = call->seqlens_k[row], first = first_key(call, past_tokens(call, row));
    if (last / call->capacity >= call->table_width)
        return "satchel:Attention: block_table has fewer blocks than seqlens_k needs";
    for (int64_t i = first / call->capacity; i <= last / call->capacity; i++) {
        int32_t block = call->block_table[row * call->table_width + i];
        if (block < 0 || block >= call->blocks)
            return "satchel:Attention: block_table names a block that the cache does not have";
    }
    return NULL;
}

static const char *check_offsets(const AttentionCall *call)
{
    if (call->capacity < MIN_BLOCK || (call->capacity & (call->capacity - 1)))
        return "satchel:Attention: the blocks of the cache are not of a power of two of positions, at least 16";
    if (!splits(call->row_offsets, call->batch, call->tokens))
        return "satchel:Attention: row_offsets do not ascend from 0 to the number of new tokens";
    return NULL;
}

static const char *check_positions(const AttentionCall *call)
{
    for (int64_t row = 0; row < call->batch; row++) {
        if (call->seqlens_k[row] < 0)
            return "satchel:Attention: seqlens_k is not within total_sequence_length";
        int64_t past = past_tokens(call, row);
        if (past < 0)
            return "satchel:Attention: seqlens_k is below the number of new tokens";
        if (!call->row_offsets && past > call->past_capacity)
            return "satchel:Attention: seqlens_k is beyond the past's capacity";
        if (call->cos && !call->rotary_row && past + new_tokens(call, row) > call->rotary_rows)
            return "satchel:Attention: a position is beyond the rotary tables";
        const char *problem = call->row_offsets ? check_blocks(call, row) : NULL;
        if (problem)
            return problem;
    }
    int64_t tokens = first_token(call, call->batch);
    for (int64_t i = 0; call->cos && call->rotary_row && i < tokens; i++)
        if (call->rotary_row[i] < 0 || call->rotary_row[i] >= call->rotary_rows)
            return "satchel:Attention: a position is beyond the rotary tables";
    return NULL;
}

/* Where the parts of the scratch memory start, in bytes; the last is their end. */
typedef struct {
    size_t ranges, tiles, table, queries, partials, end;
} Parts;

static Parts parts_of(const AttentionCall *call)
{
    size_t rows = (size_t)call->batch, singles = 0, ranges = 0;
    size_t width = (size_t)(call->heads * call->head_dim);
    for (int64_t row = 0; row < call->batch; row++)
        if (new_tokens(call, row) == 1)
            singles = rows, ranges += (size_t)decode_ranges(call, row);
    Parts parts = {.tiles = (rows + 1) * sizeof(int64_t), .table = 2 * (rows + 1) * sizeof(int64_t)};
    parts.queries = (parts.table + rows * sizeof(int32_t) + BYTES - 1) / BYTES * BYTES;
    parts.partials = parts.queries + singles * width * sizeof(float);
    parts.end = parts.partials + ranges * (width + 2 * (size_t)call->heads) * sizeof(float);
    return parts;
}

static const char *attention_check(const AttentionCall *call, size_t *scratch)
{
    *scratch = 0;
    const char *problem = check_sizes(call);
    if (!problem)
        problem = call->row_offsets ? check_offsets(call) : check_dense(call);
    if (!problem)
        problem = check_positions(call);
    if (!problem)
        *scratch = parts_of(call).end;
    return problem;
}

static void make_plan(AttentionPlan *plan, const AttentionCall *call, char *scratch)
{
    const float log2e = 0x1.715476p+0f;
    const Parts parts = parts_of(call);
    float scale = call->scale == 0.0f ? 1.0f / sqrtf((float)call->head_dim) : call->scale;
    *plan = (AttentionPlan){.call = call, .group = call->heads / call->kv_heads};
    plan->key = call->key ? call->key : call->query + call->heads * call->head_dim;
    plan->value = call->key ? call->value : call->query + (call->heads + call->kv_heads) * call->head_dim;
    plan->kv_width = (call->key ? call->kv_heads : call->heads + 2 * call->kv_heads) * call->head_dim;
    plan->query_width = call->key ? call->heads * call->head_dim : plan->kv_width;
    plan->query_scale = call->softcap > 0 ? scale / call->softcap : scale * log2e;
    plan->cap = call->softcap * log2e;
    plan->ranges = (int64_t *)(scratch + parts.ranges), plan->tiles = (int64_t *)(scratch + parts.tiles);
    plan->queries = (float *)(scratch + parts.queries), plan->partials = (float *)(scratch + parts.partials);
    plan->table = call->block_table, plan->table_width = call->table_width;
    plan->shift = call->row_offsets ? __builtin_ctzll((unsigned long long)call->capacity) : WHOLE;
    if (!call->row_offsets) {
        int32_t *own = (int32_t *)(scratch + parts.table);
        for (int64_t row = 0; row < call->batch; row++)
            own[row] = call->one_cache ? 0 : (int32_t)row;
        plan->table = own, plan->table_width = 1;
    }
    plan->ranges[0] = 0;
    for (int64_t row = 0; row < call->batch; row++)
        plan->ranges[row + 1] = plan->ranges[row] + (new_tokens(call, row) == 1 ? decode_ranges(call, row) : 0);
    prefill_plan(plan);
}

static void copy_side(const AttentionCall *call, const void *past, void *present, size_t index)
{
    if (past == present)
        return;
    int64_t row = (int64_t)index / call->kv_heads, count = past_tokens(call, row), end = count + call->tokens;
    int64_t from = (int64_t)index * call->past_capacity, to = (int64_t)index * call->capacity, width = call->head_dim;
    size_t bytes = (size_t)(width * element_bytes(call->cache_type));
    if (count)
        memcpy(cache_at(call, present, to * width), cache_at(call, past, from * width), (size_t)count * bytes);
    memset(cache_at(call, present, (to + end) * width), 0, (size_t)(call->capacity - end) * bytes);
}

/* Copies the past of one row and key head to the present, followed by zeros, unless they share memory. */
static void copy_past(void *data, size_t index)
{
    const AttentionCall *call = data;
    copy_side(call, call->past_key, call->present_key, index);
    copy_side(call, call->past_value, call->present_value, index);
}

/* The sequence that a new token is of. */
static int64_t row_of(const AttentionCall *call, int64_t token)
{
    int64_t low = 0, high = call->batch;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        *(first_token(call, middle) <= token ? &low : &high) = middle;
    }
    return low;
}

/* Some new tokens, of one key head: their keys and values go to the cache, and queries of single tokens are rotated. */
static void append_task(void *data, size_t index)
{
    const AttentionPlan *plan = data;
    const AttentionCall *call = plan->call;
    int64_t kv_head = (int64_t)index % call->kv_heads, from = (int64_t)index / call->kv_heads * APPENDED;
    int64_t end = min64(from + APPENDED, first_token(call, call->batch));
    for (int64_t row = row_of(call, from); from < end; row++) {
        int64_t first = first_token(call, row), stop = min64(end, first + new_tokens(call, row));
        append_tokens(plan, row, kv_head, from - first, stop - first);
        if (new_tokens(call, row) == 1)
            decode_queries(plan, row, kv_head);
        from = stop;
    }
}

/* Tiles of queries take longer than ranges of keys, which come last and fill the gaps. */
static void attend_task(void *data, size_t index)
{
    AttentionPlan *plan = data;
    int64_t tiles = plan->tiles[plan->call->batch] * plan->call->kv_heads, place = (int64_t)index;
    if (place < tiles)
        prefill_task(plan, place);
    else
        decode_task(plan, place - tiles);
}

static void merge_task(void *data, size_t index)
{
    const AttentionPlan *plan = data;
    for (int64_t row = (int64_t)index * MERGED, i = 0; i < MERGED && row < plan->call->batch; i++, row++)
        if (new_tokens(plan->call, row) == 1)
            decode_merge(plan, row);
}

static void run_tasks(const Parallel *parallel, bool alone, int64_t tasks, void (*task)(void *, size_t), void *data)
{
    if (!alone)
        parallel_for(parallel, (size_t)tasks, task, data);
    else
        for (int64_t index = 0; index < tasks; index++)
            task(data, (size_t)index);
}

static const char *attention_run(const AttentionCall *call, void *scratch, const Parallel *parallel)
{
    AttentionPlan plan;
    make_plan(&plan, call, scratch);
    if (call->past_key != call->present_key || call->past_value != call->present_value)
        parallel_for(parallel, (size_t)(call->batch * call->kv_heads), copy_past, (void *)call);
    int64_t tokens = first_token(call, call->batch), tiles = plan.tiles[call->batch], ranges = plan.ranges[call->batch];
    int64_t work = tiles > 0 ? ALONE : 0;
    for (int64_t row = 0; row < call->batch && work < ALONE; row++)
        work += decode_work(call, row);
    run_tasks(parallel, tokens < FEW, (tokens + APPENDED - 1) / APPENDED * call->kv_heads, append_task, &plan);
    run_tasks(parallel, work < ALONE, (tiles + ranges) * call->kv_heads, attend_task, &plan);
    if (ranges > 0)
        run_tasks(parallel, call->batch < FEW, (call->batch + MERGED - 1) / MERGED, merge_task, &plan);
    return atomic_load(&plan.failed) ? "satchel:Attention: out of memory" : NULL;
}

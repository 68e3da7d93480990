/* satchel:Attention: com.microsoft:GroupQueryAttention over a KV cache in float32, in float16, or
 * in int8 with a scale per channel. */
#include <stdlib.h>

#include "attention.h"
#include "instruction_set.h"
#include "operator.h"
#include "scratch.h"

enum { MAX_HEADS = 1 << 16 };

typedef struct {
    int64_t heads, kv_heads, first_head, own_heads, window;
    float scale, softcap;
    bool rotates, interleaved;
} AttentionParams;

static void *create(Create *create)
{
    AttentionParams *params = calloc(1, sizeof *params);
    if (params == NULL) {
        create->error = "satchel:Attention: out of memory";
        return NULL;
    }
    params->heads = attribute(create, "num_heads", 0);
    params->kv_heads = attribute(create, "kv_num_heads", 0);
    params->first_head = attribute(create, "first_head", 0);
    params->own_heads = attribute(create, "own_heads", params->heads);
    params->window = attribute(create, "local_window_size", -1);
    params->scale = attribute_float(create, "scale", 0);
    params->softcap = attribute_float(create, "softcap", 0);
    params->rotates = attribute(create, "do_rotary", 0) != 0;
    params->interleaved = attribute(create, "rotary_interleaved", 0) != 0;
    if (params->kv_heads >= 1 && params->heads >= params->kv_heads && params->heads <= MAX_HEADS
        && params->heads % params->kv_heads == 0 && params->first_head >= 0 && params->own_heads >= 1
        && params->own_heads <= params->heads - params->first_head)
        return params;
    free(params);
    create->error = "satchel:Attention: num_heads, kv_num_heads, first_head and own_heads do not fit together";
    return NULL;
}

static bool read_new_tokens(const AttentionParams *params, Run *run, AttentionCall *call)
{
    Tensor query, key, value;
    if (!input(run, 0, ORT_FLOAT, &query) || !input(run, 1, ORT_FLOAT, &key) || !input(run, 2, ORT_FLOAT, &value))
        return false;
    const bool packed = key.data == NULL && value.data == NULL;
    const int64_t heads = params->heads + (packed ? 2 * params->kv_heads : 0);
    if (query.rank != 3 || query.dims[2] < heads || query.dims[2] % heads)
        return fail(run, "satchel:Attention: the query is not [batch, tokens, heads * channels]");
    call->batch = query.dims[0], call->tokens = query.dims[1], call->head_dim = query.dims[2] / heads;
    const int64_t dims[] = {call->batch, call->tokens, params->kv_heads * call->head_dim};
    if (!packed && (!has_dims(&key, 3, dims) || !has_dims(&value, 3, dims)))
        return fail(run, "satchel:Attention: key and value do not have the shape that goes with the query's");
    call->query = query.data, call->key = key.data, call->value = value.data;
    return true;
}

/* The ragged form: the row of tokens is of several sequences, and their caches are in blocks. */
static bool read_rows(Run *run, AttentionCall *call)
{
    Tensor offsets, table;
    if (!input(run, 10, ORT_INT32, &offsets) || !input(run, 11, ORT_INT32, &table))
        return false;
    if (offsets.count == 0 || offsets.data == NULL)
        return true;
    if (call->batch != 1)
        return fail(run, "satchel:Attention: with row_offsets all new tokens are in one row");
    if (offsets.rank != 1 || offsets.count < 2)
        return fail(run, "satchel:Attention: row_offsets are not [sequences + 1]");
    call->row_offsets = offsets.data, call->batch = offsets.count - 1;
    if (table.data == NULL || table.rank != 2 || table.dims[0] != call->batch || table.dims[1] < 1)
        return fail(run, "satchel:Attention: block_table is not [sequences, blocks]");
    call->block_table = table.data, call->table_width = table.dims[1];
    return true;
}

/* The scales of a cache in int8. */
static bool read_scales(const AttentionParams *params, Run *run, AttentionCall *call)
{
    Tensor key, value;
    if (!input(run, 12, ORT_FLOAT, &key) || !input(run, 13, ORT_FLOAT, &value))
        return false;
    const int64_t dims[] = {1, params->kv_heads, 1, call->head_dim};
    const bool none = key.data == NULL && value.data == NULL;
    if (!none && (!has_dims(&key, 4, dims) || !has_dims(&value, 4, dims)))
        return fail(run, "satchel:Attention: the scales of the cache are not [1, kv_heads, 1, head_dim]");
    call->key_scale = key.data, call->value_scale = value.data;
    return true;
}

/* The past, whose type the outputs have too. */
static bool read_past(const AttentionParams *params, Run *run, AttentionCall *call)
{
    Tensor key, value;
    if (!input(run, 3, ORT_ANY, &key) || !input(run, 4, ORT_ANY, &value))
        return false;
    const bool given = key.data != NULL && value.data != NULL, int8 = key.type == ORT_INT8;
    if (given && (key.type != value.type || int8 != (call->key_scale != NULL)))
        return fail(run, "satchel:Attention: a cache in int8 has scales, and one of floats has none");
    call->cache_type = int8 ? CACHE_INT8 : key.type == ORT_FLOAT16 ? CACHE_HALF : CACHE_FLOAT;
    const bool ragged = call->row_offsets != NULL;
    call->one_cache = !ragged && call->batch > 1 && key.rank == 4 && key.dims[0] == 1;
    call->blocks = ragged ? key.dims[0] : call->one_cache ? 1 : call->batch;
    const int64_t dims[] = {call->blocks, params->kv_heads, key.dims[2], call->head_dim};
    if (!has_dims(&key, 4, dims) || !has_dims(&value, 4, dims))
        return fail(run, "satchel:Attention: the past is not [batch, kv_heads, capacity, head_dim]");
    call->past_key = key.data, call->past_value = value.data, call->past_capacity = dims[2];
    return true;
}

static bool read_lengths(Run *run, AttentionCall *call)
{
    Tensor seqlens, total;
    if (!input(run, 5, ORT_INT32, &seqlens) || !input(run, 6, ORT_INT32, &total))
        return false;
    if (seqlens.data == NULL || total.data == NULL || seqlens.count != call->batch || total.count != 1)
        return fail(run, "satchel:Attention: seqlens_k has one number for each row, total_sequence_length has one");
    call->seqlens_k = seqlens.data, call->total = *(const int32_t *)total.data;
    return true;
}

static bool read_rotation(Run *run, AttentionCall *call)
{
    Tensor cos, sin, rows;
    if (!input(run, 7, ORT_FLOAT, &cos) || !input(run, 8, ORT_FLOAT, &sin) || !input(run, 9, ORT_INT64, &rows))
        return false;
    if (cos.data == NULL || cos.rank != 2 || sin.data == NULL || !has_dims(&sin, 2, cos.dims))
        return fail(run, "satchel:Attention: cos and sin are not two tables of one shape");
    call->cos = cos.data, call->sin = sin.data, call->rotary_rows = cos.dims[0], call->rotary_half = cos.dims[1];
    const int64_t dims[] = {call->row_offsets ? 1 : call->batch, call->tokens};
    if (rows.data != NULL && !has_dims(&rows, 2, dims))
        return fail(run, "satchel:Attention: position_ids are not [batch, tokens]");
    call->rotary_row = rows.data;
    return true;
}

static bool run(const void *kernel, Run *run)
{
    const AttentionParams *params = kernel;
    AttentionCall call = {.heads = params->heads,
                          .kv_heads = params->kv_heads,
                          .first_head = params->first_head,
                          .own_heads = params->own_heads,
                          .window = params->window,
                          .scale = params->scale,
                          .softcap = params->softcap,
                          .interleaved = params->interleaved};
    if (!read_new_tokens(params, run, &call) || !read_rows(run, &call) || !read_scales(params, run, &call)
        || !read_past(params, run, &call) || !read_lengths(run, &call) || (params->rotates && !read_rotation(run, &call)))
        return false;
    const bool ragged = call.row_offsets != NULL;
    call.capacity = ragged || call.past_capacity > call.total ? call.past_capacity : call.total;
    size_t bytes;
    const char *error = instructions->attention_check(&call, &bytes);
    if (error != NULL)
        return fail(run, error);
    const int64_t dims[] = {ragged ? 1 : call.batch, call.tokens, call.own_heads * call.head_dim};
    const int64_t cache[] = {call.blocks, call.kv_heads, call.capacity, call.head_dim};
    if (!output(run, 0, dims, 3, &call.out) || !output_of_any_type(run, 1, cache, 4, &call.present_key)
        || !output_of_any_type(run, 2, cache, 4, &call.present_value))
        return false;
    if (call.past_capacity != call.capacity
        && (call.past_key == call.present_key || call.past_value == call.present_value))
        return fail(run, "satchel:Attention: past and present share memory and differ in capacity");
    if ((ragged || call.one_cache) && (call.past_key != call.present_key || call.past_value != call.present_value))
        return fail(run, "satchel:Attention: rows of one cache or of a block_table need past and present to share memory");
    void *memory = thread_scratch(OF_RUN, bytes);
    if (memory == NULL)
        return fail(run, "satchel:Attention: out of memory");
    error = instructions->attention(&call, memory, parallel_of(run, call.batch * call.tokens));
    return error == NULL || fail(run, error);
}

#define INPUTS(CACHE)                                                                 \
    {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, CACHE,     CACHE,     ORT_INT32, ORT_INT32,     \
     ORT_FLOAT, ORT_FLOAT, ORT_INT64, ORT_INT32, ORT_INT32, ORT_FLOAT, ORT_FLOAT}
static const OrtElementType FLOAT_INPUTS[] = INPUTS(ORT_FLOAT), HALF_INPUTS[] = INPUTS(ORT_FLOAT16);
static const OrtElementType INT8_INPUTS[] = INPUTS(ORT_INT8);
static const OrtElementType HALF_OUTPUTS[] = {ORT_FLOAT, ORT_FLOAT16, ORT_FLOAT16};
static const OrtElementType INT8_OUTPUTS[] = {ORT_FLOAT, ORT_INT8, ORT_INT8};

/* One operator to ONNX Runtime, which chooses by the type of the cache. */
#define ATTENTION(types) .name = "Attention", .inputs = 14, .required = 1, .outputs = 3, .create = create, .run = run, types
const Operator attention_operator = {ATTENTION(.input_types = FLOAT_INPUTS)};
const Operator attention_half_operator = {ATTENTION(.input_types = HALF_INPUTS), .output_types = HALF_OUTPUTS};
const Operator attention_int8_operator = {ATTENTION(.input_types = INT8_INPUTS), .output_types = INT8_OUTPUTS};

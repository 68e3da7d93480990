/* satchel:LinearAttention: com.microsoft:LinearAttention over a float32 state. */
#include <stdlib.h>
#include <string.h>

#include "instruction_set.h"
#include "operator.h"
#include "recurrence.h"

enum { MAX_HEADS = 1 << 16 };

static bool read_rule(RecurrenceParams *params, const char *rule)
{
    static const char *const rules[] = {"linear", "gated", "delta", "gated_delta"};
    for (int i = 0; i < 4; i++)
        if (strcmp(rule, rules[i]) == 0) {
            params->gated = i & 1, params->delta = i & 2;
            return true;
        }
    return false;
}

static void *create(Create *create)
{
    char rule[16];
    RecurrenceParams *params = calloc(1, sizeof *params);
    if (params == NULL) {
        create->error = "satchel:LinearAttention: out of memory";
        return NULL;
    }
    params->key_heads = attribute(create, "q_num_heads", 0);
    params->heads = attribute(create, "kv_num_heads", 0);
    params->scale = attribute_float(create, "scale", 0);
    params->epsilon = attribute_float(create, "epsilon", 0);
    if (params->key_heads >= 1 && params->heads >= params->key_heads && params->heads <= MAX_HEADS
        && params->heads % params->key_heads == 0 && params->scale > 0 && params->epsilon >= 0
        && attribute_text(create, "update_rule", rule, sizeof rule) && read_rule(params, rule))
        return params;
    free(params);
    create->error = "satchel:LinearAttention: invalid combination of attributes";
    return NULL;
}

static bool read_state(RecurrenceParams *params, Run *run, RecurrenceCall *call)
{
    Tensor past;
    if (!input(run, 3, ORT_FLOAT, &past))
        return false;
    call->steps = past.data != NULL && past.rank == 4 && past.dims[0] == 1 && call->batch > 1 && call->tokens == 1;
    const int64_t dims[] = {call->steps ? 1 : call->batch, params->heads, past.dims[2], past.dims[3]};
    if (past.data == NULL || !has_dims(&past, 4, dims) || dims[2] < 1 || dims[2] > MAX_STATE_DIM || dims[3] < 1
        || dims[3] > MAX_STATE_DIM)
        return fail(run, "satchel:LinearAttention: the past is not [batch, heads, key_dim, value_dim]");
    call->past = past.data, params->key_dim = dims[2], params->value_dim = dims[3];
    return true;
}

static bool read_new_tokens(RecurrenceParams *params, Run *run, RecurrenceCall *call)
{
    Tensor query, key, value;
    if (!input(run, 0, ORT_FLOAT, &query) || !input(run, 1, ORT_FLOAT, &key) || !input(run, 2, ORT_FLOAT, &value))
        return false;
    if (query.data == NULL || query.rank != 3)
        return fail(run, "satchel:LinearAttention: the query is not [batch, tokens, heads * channels]");
    call->batch = query.dims[0], call->tokens = query.dims[1];
    if (!read_state(params, run, call))
        return false;
    const bool packed = key.data == NULL && value.data == NULL;
    const int64_t keys = params->key_heads * params->key_dim, values = params->heads * params->value_dim,
                  key_dims[] = {call->batch, call->tokens, keys}, value_dims[] = {call->batch, call->tokens, values};
    if (packed ? query.dims[2] != 2 * keys + values
               : query.dims[2] != keys || !has_dims(&key, 3, key_dims) || !has_dims(&value, 3, value_dims))
        return fail(run, "satchel:LinearAttention: query, key and value do not have the shapes that go with the past's");
    const float *all = query.data;
    call->query = all, call->key = packed ? all + keys : key.data, call->value = packed ? all + 2 * keys : value.data;
    call->query_stride = call->key_stride = packed ? 2 * keys + values : keys;
    call->value_stride = packed ? 2 * keys + values : values;
    return true;
}

static bool read_gates(const RecurrenceParams *params, Run *run, RecurrenceCall *call)
{
    Tensor decay, beta;
    if (!input(run, 4, ORT_FLOAT, &decay) || !input(run, 5, ORT_FLOAT, &beta))
        return false;
    const int64_t dims[] = {call->batch, call->tokens, params->heads},
                  channels[] = {call->batch, call->tokens, params->heads * params->key_dim};
    call->channel_decay = !has_dims(&decay, 3, dims);
    if (params->gated && call->channel_decay && !has_dims(&decay, 3, channels))
        return fail(run, "satchel:LinearAttention: the decay is not [batch, tokens, heads] or [..., heads * key_dim]");
    if (params->delta && !has_dims(&beta, 3, dims))
        return fail(run, "satchel:LinearAttention: beta is not [batch, tokens, heads]");
    call->decay = decay.data, call->beta = beta.data;
    call->channel_decay = call->channel_decay && params->gated;
    return true;
}

static bool run(const void *kernel, Run *run)
{
    RecurrenceParams params = *(const RecurrenceParams *)kernel;
    RecurrenceCall call = {0};
    if (!read_new_tokens(&params, run, &call) || !read_gates(&params, run, &call))
        return false;
    const int64_t dims[] = {call.batch, call.tokens, params.heads * params.value_dim},
                  state[] = {call.steps ? 1 : call.batch, params.heads, params.key_dim, params.value_dim};
    if (!output(run, 0, dims, 3, &call.out) || !output(run, 1, state, 4, &call.present))
        return false;
    if (call.steps)
        call.tokens = call.batch, call.batch = 1;
    const char *error = instructions->recurrence(&params, &call, parallel_of(run, call.batch * call.tokens));
    return error == NULL || fail(run, error);
}

static const OrtElementType INPUTS[] = {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT};

const Operator recurrence_operator = {.name = "LinearAttention", .inputs = 6, .required = 1, .outputs = 2,
                                      .input_types = INPUTS, .create = create, .run = run};

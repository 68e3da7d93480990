/* satchel:Linear: reads and checks the attributes and inputs of a node, and runs it. */
#include <stdlib.h>
#include <string.h>

#include "helpers.h"
#include "instruction_set.h"
#include "linear_op.h"
#include "ragged.h"
#include "scratch.h"
#include "serial.h"

enum {
    MAX_SIZE = 1 << 24,
    /* Sums of int32 stay exact: 128 * 127 * inputs, or 255 * 127 * block with zero points, is below 2^31. */
    MAX_CHANNEL_INPUTS = (1 << 17) - 4, /* 128 * 128 * inputs, of lower halves of values with 16 bits, is too */
    MAX_BLOCK = 1 << 16,
};

static const char *const GATES[] = {"", "silu", "gelu", "gelu_tanh", "relu"};

static bool is_gate(LinearParams *params, const char *text)
{
    for (int i = 0; i < 5; i++)
        if (strcmp(text, GATES[i]) == 0) {
            params->gate = (Gate)i;
            return true;
        }
    return false;
}

static bool valid_params(const LinearParams *params)
{
    const RowParams *row = &params->row;
    const int64_t k = row->inputs, n = params->outputs, block = row->block, mixed = row->hadamard;
    return k >= 1 && k <= MAX_SIZE && n >= 1 && n <= MAX_SIZE
        && (params->bits == 8 || params->bits == 4 || params->bits == 16)
        && (params->bits == 16 ? block == 0
            : block == 0       ? params->bits == 8 && k <= MAX_CHANNEL_INPUTS
                       : block >= 8 && block <= MAX_BLOCK && k % block == 0 && block % 8 == 0)
        && (mixed == 0 || (mixed >= 2 && (mixed & (mixed - 1)) == 0 && k % mixed == 0))
        && (params->gate == GATE_NONE || (n % 2 == 0 && params->unread_end == 0)) && row->epsilon >= 0;
}

static bool read_params(Create *create, LinearParams *params)
{
    char text[16];
    *params = (LinearParams){.bits = (int)attribute(create, "bits", 8), .outputs = attribute(create, "outputs", 0)};
    params->row.inputs = attribute(create, "inputs", 0);
    params->row.block = attribute(create, "block", 0);
    params->row.hadamard = attribute(create, "hadamard", 0);
    params->row.epsilon = attribute_float(create, "epsilon", 0);
    params->unread = attribute(create, "unread", 0);
    params->unread_end = attribute(create, "unread_end", 0);
    return attribute_text(create, "gate", text, sizeof text) && is_gate(params, text) && valid_params(params);
}

void *create_linear(Create *create)
{
    LinearKernel *kernel = malloc(sizeof *kernel);
    if (kernel == NULL) {
        create->error = "satchel:Linear: out of memory";
        return NULL;
    }
    const int64_t whole = attribute(create, "whole", ALL_ROWS);
    kernel->joined = whole == OWN_ROWS || whole == NO_ROWS ? (Joined)whole : ALL_ROWS;
    if (read_params(create, &kernel->params))
        return kernel;
    free(kernel);
    create->error = "satchel:Linear: invalid combination of attributes";
    return NULL;
}

static bool fits(const LinearParams *params, const Tensor *weights, const Tensor *scales, const Tensor *zero_points,
                 const Tensor *bias, const Tensor *norm_weight)
{
    const int64_t whole[] = {panels(params), panel_bytes(params)},
                  blocks[] = {panels(params), row_scales(&params->row), 16};
    return has_dims(weights, 2, whole)
        && (params->bits == 16 ? scales->data == NULL : scales->data != NULL && has_dims(scales, 3, blocks))
        && (scales->data == NULL || scales->type == ORT_FLOAT || (scales->type == ORT_FLOAT16 && params->row.block))
        && (zero_points->data == NULL || (params->row.block && has_dims(zero_points, 3, blocks)))
        && (bias->data == NULL || has_dims(bias, 1, &params->outputs))
        && (norm_weight->data == NULL || has_dims(norm_weight, 1, &params->row.inputs));
}

/* What helpers read of a call with one row: in memory of their own, since the run may be over before they are. */
typedef struct {
    const LinearParams *params;
    LinearCall call;
    int64_t each; /* panels of a unit: a gate's are in pairs */
} Shared;

static bool multiply_units(const void *data, size_t from, size_t end, void *results)
{
    const Shared *shared = data;
    LinearCall call = shared->call;
    const int64_t all = panels(shared->params), stop = (int64_t)end * shared->each;
    call.y = results;
    call.first_panel = (int64_t)from * shared->each;
    call.end_panel = stop < all ? stop : all;
    return instructions->linear(shared->params, &call, &SERIAL) == NULL;
}

static size_t in_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Whether a call has one row, and weights that live as long as the kernel. */
static bool can_be_helped(const Run *run, const LinearCall *call)
{
    const void *const weights[] = {NULL, call->weights, call->scales, call->zero_points, call->bias};
    bool all = call->rows == 1;
    for (size_t i = FIRST_WEIGHT; i < END_OF_WEIGHTS; i++)
        all = all && (run->constants[i].data != NULL || weights[i] == NULL);
    return all;
}

/* Runs a call with one row by this thread and helpers, and sets `error` or NULL. Returns false if there are none. */
static bool run_with_helpers(const LinearParams *params, const LinearCall *call, size_t helpers, const char **error)
{
    const size_t outputs = (size_t)half_outputs(params), head = in_lines(sizeof(Shared));
    const size_t input = in_lines((size_t)rounded_bytes(params, 1));
    const size_t residual = call->residual == NULL ? 0 : outputs * sizeof *call->residual;
    char *memory = helpers_begin(helpers, head + input + residual);
    if (memory == NULL)
        return false;
    Shared *shared = (Shared *)memory;
    shared->params = params, shared->call = *call;
    shared->call.single = call->single || call->row_offsets != NULL, shared->call.row_offsets = NULL;
    shared->each = 2 * ((panels(params) + 2 * MOST_UNITS - 1) / (2 * MOST_UNITS));
    shared->call.rounded = memory + head;
    *error = NULL;
    if (call->rounded == NULL)
        *error = instructions->round(params, call, 0, 1, memory + head, &SERIAL);
    else
        memcpy(memory + head, call->rounded, (size_t)rounded_bytes(params, 1));
    if (*error != NULL) {
        helpers_cancel();
        return true;
    }
    if (residual > 0)
        shared->call.residual = memcpy(memory + head + input, call->residual, residual);
    const Job job = {.run = multiply_units,
                     .data = shared,
                     .units = (size_t)((panels(params) + shared->each - 1) / shared->each),
                     .unit_bytes = (size_t)shared->each * 16 / (params->gate ? 2 : 1) * sizeof *call->y,
                     .result_bytes = outputs * sizeof *call->y,
                     .stream = (const char *)call->weights,
                     .stream_bytes = (size_t)(panels(params) * panel_bytes(params))};
    if (!helpers_run(&job, call->y))
        *error = "satchel:Linear: out of memory";
    return true;
}

enum { WIDTHS = 9, ADDED = 10 };

/* The x of a layer: an input, or what all ranks have of it, which the second output is. */
static bool read_x(Run *run, Join *join, Tensor *x)
{
    float *all;
    *join = (Join){0};
    if (!input(run, WIDTHS, ORT_INT64, x))
        return false;
    if (x->data == NULL)
        return input(run, 0, ORT_FLOAT, x);
    if (!read_join(run, WIDTHS, ADDED, join) || !output(run, 1, join->dims, join->rank, &all))
        return false;
    *x = (Tensor){.data = all, .count = join->rows * join->total, .rank = join->rank};
    memcpy(x->dims, join->dims, sizeof x->dims);
    return true;
}

static bool run(const void *own, Run *run)
{
    const LinearKernel *kernel = own;
    const LinearParams *params = &kernel->params;
    Join join;
    Tensor x, weights, scales, zero_points, bias, residual, norm_weight, offsets, rounded;
    if (!read_x(run, &join, &x) || !input(run, 1, ORT_UINT8, &weights) || !input(run, 2, ORT_ANY, &scales)
        || !input(run, 3, ORT_UINT8, &zero_points) || !input(run, 4, ORT_FLOAT, &bias)
        || !input(run, 5, ORT_FLOAT, &residual) || !input(run, 6, ORT_FLOAT, &norm_weight)
        || !input(run, 7, ORT_INT32, &offsets) || !input(run, 8, ORT_UINT8, &rounded))
        return false;
    if (x.rank == 0 || x.dims[x.rank - 1] != params->row.inputs)
        return fail(run, "satchel:Linear: the input width differs from attribute inputs");
    if (!fits(params, &weights, &scales, &zero_points, &bias, &norm_weight))
        return fail(run, "satchel:Linear: a weight does not have the shape or type of the attributes");
    const int64_t rows = x.count / params->row.inputs;
    const bool single = x.rank >= 2 && x.dims[x.rank - 2] == 1;
    x.dims[x.rank - 1] = half_outputs(params);
    if (residual.data != NULL && !has_dims(&residual, x.rank, x.dims))
        return fail(run, "satchel:Linear: the residual does not have the shape of the output");
    if ((rounded.data != NULL || join.width != NULL) && params->bits == 16)
        return fail(run, "satchel:Linear: with 16 bits rows are not quantized");
    if (rounded.data != NULL && rounded.count != rounded_bytes(params, rows))
        return fail(run, "satchel:Linear: the quantized rows are not those of x");
    const bool ragged = offsets.count > 0 && offsets.data != NULL;
    if (ragged && !splits(offsets.data, offsets.count - 1, rows))
        return fail(run, "satchel:Linear: row_offsets do not ascend from 0 to the number of rows");
    LinearCall call = {.rows = rows,
                       .single = single,
                       .row_offsets = ragged ? offsets.data : NULL,
                       .sequences = offsets.count - 1,
                       .x = x.data,
                       .weights = weights.data,
                       .scales = scales.data,
                       .half_scales = scales.data != NULL && scales.type == ORT_FLOAT16,
                       .zero_points = zero_points.data,
                       .bias = bias.data,
                       .residual = residual.data,
                       .norm_weight = norm_weight.data,
                       .rounded = rounded.data};
    if (!output(run, 0, x.dims, x.rank, &call.y))
        return false;
    if (join.width != NULL && rows > 0) {
        call.rounded = thread_scratch(OF_EXCHANGE, (size_t)rounded_bytes(params, rows));
        if (call.rounded == NULL)
            return fail(run, "satchel:Linear: out of memory");
        if (!join_rounded(run, &join, params, &call, kernel->joined, x.data, call.rounded))
            return false;
    }
    const char *error;
    if (!can_be_helped(run, &call) || !run_with_helpers(params, &call, run->helpers, &error))
        error = instructions->linear(params, &call, parallel_of(run, rows));
    return error == NULL || fail(run, error);
}

static const OrtElementType INPUTS[] = {ORT_FLOAT, ORT_UINT8, ORT_ANY,   ORT_UINT8, ORT_FLOAT, ORT_FLOAT,
                                        ORT_FLOAT, ORT_INT32, ORT_UINT8, ORT_INT64, ORT_FLOAT};

const Operator linear_operator = {.name = "Linear",
                                  .inputs = 11,
                                  .required = 2,
                                  .outputs = 2,
                                  .optional_outputs = 1,
                                  .input_types = INPUTS,
                                  .create = create_linear,
                                  .run = run};

/* satchel:TableLinear: reads and checks the attributes and inputs of a node, and runs it. */
#include <stdlib.h>

#include "instruction_set.h"
#include "operator.h"
#include "table.h"

static void *create(Create *create)
{
    TableParams *params = calloc(1, sizeof *params);
    if (params == NULL) {
        create->error = "satchel:TableLinear: out of memory";
        return NULL;
    }
    params->row.inputs = attribute(create, "inputs", 0);
    params->row.block = attribute(create, "block", 0);
    params->outputs = attribute(create, "outputs", 0);
    const int64_t k = params->row.inputs, block = params->row.block;
    if (k >= 1 && k <= 1 << 24 && params->outputs >= 1 && params->outputs <= 1 << 24 
        && (block == 0 || (block >= 16 && (block & (block - 1)) == 0 && k % block == 0)))
        return params;
    free(params);
    create->error = "satchel:TableLinear: invalid combination of attributes";
    return NULL;
}

static bool run(const void *kernel, Run *run)
{
    const TableParams *params = kernel;
    const int64_t inputs = params->row.inputs, block = params->row.block;
    const int64_t blocks = block ? inputs / block : 0, whole[] = {params->outputs, block ? blocks : inputs, block};
    Tensor x, weights, scales;
    if (!input(run, 0, ORT_FLOAT, &x) || !input(run, 1, block ? ORT_UINT8 : ORT_FLOAT16, &weights)
        || !input(run, 2, ORT_FLOAT, &scales))
        return false;
    if (x.rank == 0 || x.dims[x.rank - 1] != inputs)
        return fail(run, "satchel:TableLinear: the input width differs from attribute inputs");
    const bool scaled = block ? scales.data != NULL && has_dims(&scales, 2, whole) : scales.data == NULL;
    if (!has_dims(&weights, block ? 3 : 2, whole) || !scaled)
        return fail(run, "satchel:TableLinear: the table does not have the shape of the attributes");
    TableCall call = {.rows = x.count / inputs, .x = x.data, .weights = weights.data, .scales = scales.data};
    x.dims[x.rank - 1] = params->outputs;
    if (!output(run, 0, x.dims, x.rank, &call.y))
        return false;
    const char *error = instructions->table(params, &call, &run->contiguous);
    return error == NULL || fail(run, error);
}

static const OrtElementType INPUTS[] = {ORT_FLOAT, ORT_ANY, ORT_FLOAT};

const Operator table_linear_operator = {.name = "TableLinear",
                                        .inputs = 3,
                                        .required = 2,
                                        .outputs = 1,
                                        .input_types = INPUTS,
                                        .create = create,
                                        .run = run};

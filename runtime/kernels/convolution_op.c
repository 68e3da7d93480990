/* satchel:CausalConv: com.microsoft:CausalConvWithState over channels that are last, in float32. */
#include <stdlib.h>
#include <string.h>

#include "convolution.h"
#include "instruction_set.h"
#include "operator.h"

typedef struct {
    bool silu;
} Params;

static void *create(Create *create)
{
    char activation[16];
    Params *params = calloc(1, sizeof *params);
    if (params == NULL) {
        create->error = "satchel:CausalConv: out of memory";
        return NULL;
    }
    if (attribute_text(create, "activation", activation, sizeof activation)
        && (activation[0] == 0 || strcmp(activation, "silu") == 0)) {
        params->silu = activation[0] != 0;
        return params;
    }
    free(params);
    create->error = "satchel:CausalConv: unknown activation";
    return NULL;
}

static bool run(const void *kernel, Run *run)
{
    Tensor x, weight, bias, past;
    if (!input(run, 0, ORT_FLOAT, &x) || !input(run, 1, ORT_FLOAT, &weight) || !input(run, 2, ORT_FLOAT, &bias)
        || !input(run, 3, ORT_FLOAT, &past))
        return false;
    if (x.data == NULL || x.rank != 3)
        return fail(run, "satchel:CausalConv: the input is not [batch, tokens, channels]");
    ConvolutionCall call = {.batch = x.dims[0], .tokens = x.dims[1], .channels = x.dims[2], .width = weight.dims[2], .x = x.data,
                 .weight = weight.data, .bias = bias.data, .past = past.data,
                 .silu = ((const Params *)kernel)->silu};
    if (past.data != NULL && past.rank == 3 && past.dims[0] == 1 && call.batch > 1 && call.tokens == 1)
        call.tokens = call.batch, call.batch = 1; /* rows are the next tokens of one sequence */
    const int64_t weight_dims[] = {call.channels, 1, call.width},
                  state[] = {call.batch, call.width - 1, call.channels};
    if (weight.data == NULL || !has_dims(&weight, 3, weight_dims) || call.width < 2 || call.width > MAX_WIDTH)
        return fail(run, "satchel:CausalConv: the weight is not [channels, 1, width], 2 to 32 wide");
    if (bias.data != NULL && !has_dims(&bias, 1, &call.channels))
        return fail(run, "satchel:CausalConv: the bias is not [channels]");
    if (past.data == NULL || !has_dims(&past, 3, state))
        return fail(run, "satchel:CausalConv: the past is not [batch, width - 1, channels]");
    if (!output(run, 0, x.dims, 3, &call.y) || !output(run, 1, state, 3, &call.present))
        return false;
    instructions->convolution(&call, parallel_of(run, call.batch * call.tokens));
    return true;
}

static const OrtElementType INPUTS[] = {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT};

const Operator convolution_operator = {.name = "CausalConv", .inputs = 4, .required = 2, .outputs = 2,
                                       .input_types = INPUTS, .create = create, .run = run};

/* satchel:CausalConv: com.microsoft:CausalConvWithState over channels that are last, in float32. */
#include "vectors.h"

#include <stdlib.h>
#include <string.h>

#include "exponential.h"
#include "operator.h"

enum { MAX_WIDTH = 32, BLOCK = 8 * LANES };

typedef struct {
    bool silu;
} Params;

typedef struct {
    int64_t batch, tokens, channels, width;
    const float *x, *weight, *bias, *past; /* [batch, tokens, channels], [channels, width], [channels], [batch, width - 1,
                                              channels] */
    float *y, *present;                    /* shaped as x; as past, may be the same memory */
    bool silu;
    int64_t blocks;
} Call;

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

INLINE __m512 silu(__m512 x)
{
    const __m512 e = exp2_lanes(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), e));
}

/* The input `back` tokens before the first new one, or after it. */
static const float *source(const Call *call, int64_t row, int64_t token)
{
    return token < 0 ? call->past + (row * (call->width - 1) + call->width - 1 + token) * call->channels
                     : call->x + (row * call->tokens + token) * call->channels;
}

/* All tokens of up to BLOCK channels of a row. Sums are in the order of the inputs, oldest first. */
static void run_block(void *data, size_t index)
{
    const Call *call = data;
    const int64_t row = (int64_t)index / call->blocks, first = (int64_t)index % call->blocks * BLOCK;
    const int64_t width = call->width, count = call->channels - first < BLOCK ? call->channels - first : BLOCK;
    float weights[MAX_WIDTH][BLOCK];
    for (int64_t c = 0; c < count; c++)
        for (int64_t w = 0; w < width; w++)
            weights[w][c] = call->weight[(first + c) * width + w];
    for (int64_t t = 0; t < call->tokens; t++) {
        const float *taps[MAX_WIDTH];
        for (int64_t w = 0; w < width; w++)
            taps[w] = source(call, row, t - (width - 1) + w) + first;
        float *y = call->y + (row * call->tokens + t) * call->channels + first;
        for (int64_t c = 0; c < count; c += LANES) {
            const __mmask16 mask = lanes(count - c);
            __m512 sum = call->bias == NULL ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, call->bias + first + c);
            for (int64_t w = 0; w < width; w++)
                sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, weights[w] + c),
                                      _mm512_maskz_loadu_ps(mask, taps[w] + c), sum);
            _mm512_mask_storeu_ps(y + c, mask, call->silu ? silu(sum) : sum);
        }
    }
    /* ascending: where past and present are one, each input is read before it is overwritten */
    for (int64_t w = 0; w < width - 1; w++)
        memmove(call->present + (row * (width - 1) + w) * call->channels + first,
                source(call, row, call->tokens - (width - 1) + w) + first, count * sizeof(float));
}

static bool run(const void *kernel, Run *run)
{
    Tensor x, weight, bias, past;
    if (!input(run, 0, ORT_FLOAT, &x) || !input(run, 1, ORT_FLOAT, &weight) || !input(run, 2, ORT_FLOAT, &bias)
        || !input(run, 3, ORT_FLOAT, &past))
        return false;
    if (x.data == NULL || x.rank != 3)
        return fail(run, "satchel:CausalConv: the input is not [batch, tokens, channels]");
    Call call = {.batch = x.dims[0], .tokens = x.dims[1], .channels = x.dims[2], .width = weight.dims[2], .x = x.data,
                 .weight = weight.data, .bias = bias.data, .past = past.data,
                 .silu = ((const Params *)kernel)->silu, .blocks = (x.dims[2] + BLOCK - 1) / BLOCK};
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
    parallel_for(&run->parallel, (size_t)(call.batch * call.blocks), run_block, &call);
    return true;
}

static const OrtElementType INPUTS[] = {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT};

Operator convolution_operator = {.name = "CausalConv", .inputs = 4, .required = 2, .outputs = 2,
                                 .input_types = INPUTS, .create = create, .run = run};

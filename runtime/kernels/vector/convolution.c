#include "vectors.h"

#include <string.h>

#include "../convolution.h"
#include "exponential.h"

enum { CHANNELS = 8 * LANES }; /* of a task */

static int64_t channel_blocks(const ConvolutionCall *call) { return (call->channels + CHANNELS - 1) / CHANNELS; }

/* The input `back` tokens before the first new one, or after it. */
static const float *source(const ConvolutionCall *call, int64_t row, int64_t token)
{
    return token < 0 ? call->past + (row * (call->width - 1) + call->width - 1 + token) * call->channels
                     : call->x + (row * call->tokens + token) * call->channels;
}

/* Up to LANES channels of a token. Sums are in the order of the inputs, oldest first. */
INLINE void convolve(const bool whole, const ConvolutionCall *call, const float *weights, const float *const *taps,
                     int64_t channel, int64_t left, const float *bias, float *y)
{
    F16 sum = bias == NULL ? floats(0) : load_up_to(whole, bias, left);
    for (int64_t w = 0; w < call->width; w++)
        sum = mul_add(load(weights + w * CHANNELS), load_up_to(whole, taps[w] + channel, left), sum);
    if (call->silu)
        sum = silu(sum);
    store_up_to(whole, y, left, sum);
}

/* All tokens of up to CHANNELS channels of a row. */
static void run_channels(void *data, size_t index)
{
    const ConvolutionCall *call = data;
    const int64_t blocks = channel_blocks(call), row = (int64_t)index / blocks;
    const int64_t first = (int64_t)index % blocks * CHANNELS;
    const int64_t width = call->width, count = call->channels - first < CHANNELS ? call->channels - first : CHANNELS;
    float weights[MAX_WIDTH][CHANNELS];
    for (int64_t c = count; c % LANES != 0; c++)
        for (int64_t w = 0; w < width; w++)
            weights[w][c] = 0;
    for (int64_t c = 0; c < count; c++)
        for (int64_t w = 0; w < width; w++)
            weights[w][c] = call->weight[(first + c) * width + w];
    const float *bias = call->bias == NULL ? NULL : call->bias + first;
    for (int64_t t = 0; t < call->tokens; t++) {
        const float *taps[MAX_WIDTH];
        for (int64_t w = 0; w < width; w++)
            taps[w] = source(call, row, t - (width - 1) + w) + first;
        float *y = call->y + (row * call->tokens + t) * call->channels + first;
        int64_t c = 0;
        for (; c + LANES <= count; c += LANES)
            convolve(true, call, weights[0] + c, taps, c, LANES, bias == NULL ? NULL : bias + c, y + c);
        if (c < count)
            convolve(false, call, weights[0] + c, taps, c, count - c, bias == NULL ? NULL : bias + c, y + c);
    }
    /* ascending: where past and present are one, each input is read before it is overwritten */
    for (int64_t w = 0; w < width - 1; w++)
        memmove(call->present + (row * (width - 1) + w) * call->channels + first,
                source(call, row, call->tokens - (width - 1) + w) + first, count * sizeof(float));
}

static void convolution_run(const ConvolutionCall *call, const Parallel *parallel)
{
    parallel_for(parallel, (size_t)(call->batch * channel_blocks(call)), run_channels, (void *)call);
}

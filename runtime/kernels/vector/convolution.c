#include "vectors.h"

#include <string.h>

#include "../convolution.h"
#include "exponential.h"

enum { CHANNELS = 8 * LANES }; /* of a task */

static int64_t channel_blocks(const ConvolutionCall *call) { return (call->channels + CHANNELS - 1) / CHANNELS; }

INLINE __m512 silu(__m512 x)
{
    const __m512 e = exp2_lanes(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), e));
}

/* The input `back` tokens before the first new one, or after it. */
static const float *source(const ConvolutionCall *call, int64_t row, int64_t token)
{
    return token < 0 ? call->past + (row * (call->width - 1) + call->width - 1 + token) * call->channels
                     : call->x + (row * call->tokens + token) * call->channels;
}

/* All tokens of up to CHANNELS channels of a row. Sums are in the order of the inputs, oldest first. */
static void run_channels(void *data, size_t index)
{
    const ConvolutionCall *call = data;
    const int64_t blocks = channel_blocks(call), row = (int64_t)index / blocks;
    const int64_t first = (int64_t)index % blocks * CHANNELS;
    const int64_t width = call->width, count = call->channels - first < CHANNELS ? call->channels - first : CHANNELS;
    float weights[MAX_WIDTH][CHANNELS];
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

static void convolution_run(const ConvolutionCall *call, const Parallel *parallel)
{
    parallel_for(parallel, (size_t)(call->batch * channel_blocks(call)), run_channels, (void *)call);
}

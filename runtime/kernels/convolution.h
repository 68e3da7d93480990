/* A causal convolution of each channel over its last inputs, with a state of those before. */
#ifndef SATCHEL_CONVOLUTION_H
#define SATCHEL_CONVOLUTION_H

#include <stdbool.h>
#include <stdint.h>

#include "parallel.h"

enum { MAX_WIDTH = 32 };

typedef struct {
    int64_t batch, tokens, channels, width;
    const float *x, *weight, *bias, *past; /* [batch, tokens, channels], [channels, width], [channels], [batch, width - 1,
                                              channels] */
    float *y, *present;                    /* shaped as x; as past, may be the same memory */
    bool silu;
} ConvolutionCall;

#endif

/* Rounds weights for `satchel export`: the inner loops of export/quantize/, with the same bits as numpy and torch. */
#ifndef SATCHEL_ROUNDING_H
#define SATCHEL_ROUNDING_H

#include <stdint.h>

enum { MAX_INPUTS = 128 }; /* of an InputsCall */

/* Which of several scales rounds each group of weights with the least sum of squared errors. */
typedef struct {
    int64_t groups, width, candidates; /* width: a multiple of 8 */
    int64_t kinds;                     /* after so many groups, `counts` starts again */
    const float *weights;              /* [groups, width] */
    const float *scales, *zeros;       /* [candidates, groups]; zeros may be NULL */
    const float *counts;               /* [kinds, width]: what the squared error of each counts; may be NULL */
    float low, high;                   /* bounds of quantized values */
    float *scratch;                    /* [4 * width + 32 * candidates] */
    int32_t *best;                     /* [groups]: the first candidate that no other is better than */
} ScalesCall;

/* Consecutive inputs of a layer, which are rounded one after the other. Matrices are [inputs, outputs]. */
typedef struct {
    int64_t inputs, outputs; /* inputs: at most MAX_INPUTS */
    const float *square;     /* [inputs, inputs] of rows of `stride` */
    int64_t stride;
    const int64_t *group_of;     /* [inputs] */
    const float *scales, *zeros; /* [groups, outputs]; zeros may be NULL */
    float low, high;             /* bounds of quantized values */
    const float *values;         /* the weights, or half of the slope */
    float *codes;                /* out: quantized values; descending, those of before are read */
    float *moved;                /* out: what later inputs make up for */
} InputsCall;

#endif

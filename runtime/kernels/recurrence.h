/* Linear recurrences over a state in place: linear attention, gated, and with the delta rule. */
#ifndef SATCHEL_RECURRENCE_H
#define SATCHEL_RECURRENCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "parallel.h"

enum { MAX_STATE_DIM = 4096 };

typedef struct {
    int64_t key_heads, heads, key_dim, value_dim;
    float scale;
    float epsilon; /* above 0: queries and keys are divided by sqrt(sum of squares + epsilon) */
    bool gated, delta;
} RecurrenceParams;

/* One run; rows of query, key and value are `*_stride` floats apart. */
typedef struct {
    int64_t batch, tokens, query_stride, key_stride, value_stride;
    const float *query, *key, *value; /* [batch, tokens, heads * dim] */
    const float *decay;               /* logarithms: [batch, tokens, heads], or with a value for each key channel */
    const float *beta;                /* [batch, tokens, heads] */
    const float *past;                /* [batch, heads, key_dim, value_dim] */
    float *out, *present;             /* [batch, tokens, heads * value_dim]; shaped as past, may be the same memory */
    bool channel_decay;
    bool steps; /* tokens are computed one by one, each as the only one of a run */
} RecurrenceCall;

#endif

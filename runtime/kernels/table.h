/* A linear layer over an embedding table (tied head): 8-bit blocks, zero point 128. */
#ifndef SATCHEL_TABLE_H
#define SATCHEL_TABLE_H

#include <stdint.h>

#include "parallel.h"
#include "rows.h"

typedef struct {
    RowParams row;
    int64_t outputs;
} TableParams;

typedef struct {
    int64_t rows;
    const float *x;         /* [rows, inputs] */
    const uint8_t *weights; /* [outputs, inputs] */
    const float *scales;    /* [outputs, blocks] */
    float *y;               /* [rows, outputs] */
} TableCall;

#endif

/* A linear layer over an embedding table (tied head): blocks of 8 bits with zero point 128, or half
 * precision. */
#ifndef SATCHEL_TABLE_H
#define SATCHEL_TABLE_H

#include <stdint.h>

#include "parallel.h"
#include "rows.h"

typedef struct {
    RowParams row; /* block 0: a table in half precision */
    int64_t outputs;
} TableParams;

typedef struct {
    int64_t rows;
    const float *x;         /* [rows, inputs] */
    const void *weights;    /* [outputs, inputs] */
    const float *scales;    /* [outputs, blocks], or NULL */
    float *y;               /* [rows, outputs] */
} TableCall;

#endif

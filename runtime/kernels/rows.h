/* Quantization of activation rows to 8 or 16 bits. */
#ifndef SATCHEL_ROWS_H
#define SATCHEL_ROWS_H

#include <stdint.h>

/* How a row of `inputs` floats is transformed and quantized. */
typedef struct {
    int64_t inputs, block; /* block 0: one scale for the row */
    float epsilon;         /* > 0: RMS norm first */
    int64_t hadamard;      /* > 0: then this many at a time times the Hadamard matrix / sqrt(hadamard) */
} RowParams;

/* Bytes of a quantized row: whole vectors, so that they are written without a mask; padded with zeros. */
static inline int64_t row_bytes(const RowParams *params) { return (params->inputs + 63) / 64 * 64; }
static inline int64_t row_scales(const RowParams *params) { return params->block ? params->inputs / params->block : 1; }

#endif

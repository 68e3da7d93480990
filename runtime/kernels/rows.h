/* Quantization of activation rows to int8. */
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

/* Quantizes one row: int8 values [row_bytes], and for each block its scale and the sum of its values.
 * `norm_weight` [inputs] or NULL; `scratch` [row_bytes] floats. A row with a NaN gets NaN scales. */
void quantize_row(const RowParams *params, const float *x, const float *norm_weight, float *scratch, int8_t *quantized,
                  float *scales, int32_t *sums);

/* Quantizes a row with one scale, and then its quantization error. The second values, scale and sum follow the first;
 * their sum is within 1/64,000 of the row's largest magnitude. */
void quantize_row_twice(const RowParams *params, const float *x, const float *norm_weight, float *scratch,
                        int8_t *quantized, float *scales, int32_t *sums);

#endif

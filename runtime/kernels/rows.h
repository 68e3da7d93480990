/* Rows of activations on their way to int8. */
#ifndef SATCHEL_ROWS_H
#define SATCHEL_ROWS_H

#include <stdint.h>

/* What is done to a row of `inputs` numbers before it is rounded. */
typedef struct {
    int64_t inputs, block; /* block 0: one scale for the row */
    float epsilon;         /* > 0: RMS norm first */
    int64_t hadamard;      /* > 0: then this many at a time times the Hadamard matrix / sqrt(hadamard) */
} RowForm;

/* Bytes of a row of codes: whole vectors, so that they can be written without a mask; what is beyond is zero. */
static inline int64_t code_bytes(const RowForm *form) { return (form->inputs + 63) / 64 * 64; }
static inline int64_t row_scales(const RowForm *form) { return form->block ? form->inputs / form->block : 1; }

/* Round one row: codes [code_bytes] int8, and for each block of it a scale and the sum of its codes.
 * `gain` [inputs] or NULL; `room` [code_bytes] float. A row with a NaN gets scales that are NaN.
 */
void round_row(const RowForm *form, const float *x, const float *gain, float *room, int8_t *codes, float *scales, int32_t *sums);

/* The same for a row with one scale, twice: what the first rounding has left is rounded as well. The second codes,
 * scale and sum come behind the first; the row is about the sum of both, to 1 part in 64,000 of its largest number.
 */
void round_row_twice(const RowForm *form, const float *x, const float *gain, float *room, int8_t *codes, float *scales, int32_t *sums);

#endif

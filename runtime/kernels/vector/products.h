/* Products of small float matrices. Include "vectors.h" before anything else. */
#ifndef SATCHEL_PRODUCTS_H
#define SATCHEL_PRODUCTS_H

#include "vectors.h"

enum { TALL = 8 }; /* rows of a tile, which is two vectors wide */

/* Small matrix products: c[r] = keep[r] c[r] + sum over j of a[r, j] b[j]. */
typedef struct {
    const float *a, *b, *keep; /* keep NULL: c is not read */
    float *c;
    int64_t inner, a_row, a_column, b_row, c_row;
} Product;

INLINE void product_tile(const Product *p, int64_t row, int64_t column, int64_t columns, const int height)
{
    const __mmask16 first = lanes(columns - column), second = lanes(columns - column - LANES);
    const float *a = p->a + row * p->a_row, *b = p->b + column;
    float *c = p->c + row * p->c_row + column;
    __m512 left[TALL], right[TALL];
    UNROLL for (int r = 0; r < height; r++) {
        left[r] = right[r] = _mm512_setzero_ps();
        if (p->keep != NULL) {
            const __m512 keep = _mm512_set1_ps(p->keep[row + r]);
            left[r] = _mm512_mul_ps(keep, _mm512_maskz_loadu_ps(first, c + r * p->c_row));
            right[r] = _mm512_mul_ps(keep, _mm512_maskz_loadu_ps(second, c + r * p->c_row + LANES));
        }
    }
    for (int64_t j = 0; j < p->inner; j++) {
        const __m512 b0 = _mm512_maskz_loadu_ps(first, b + j * p->b_row);
        const __m512 b1 = _mm512_maskz_loadu_ps(second, b + j * p->b_row + LANES);
        UNROLL for (int r = 0; r < height; r++) {
            const __m512 weight = _mm512_set1_ps(a[r * p->a_row + j * p->a_column]);
            left[r] = _mm512_fmadd_ps(weight, b0, left[r]);
            right[r] = _mm512_fmadd_ps(weight, b1, right[r]);
        }
    }
    UNROLL for (int r = 0; r < height; r++) {
        _mm512_mask_storeu_ps(c + r * p->c_row, first, left[r]);
        _mm512_mask_storeu_ps(c + r * p->c_row + LANES, second, right[r]);
    }
}

/* Each number is one sum in the order of j, whatever the sizes. */
static void multiply(const Product *p, int64_t rows, int64_t columns)
{
    for (int64_t column = 0; column < columns; column += 2 * LANES) {
        int64_t row = 0;
        for (; row + TALL <= rows; row += TALL)
            product_tile(p, row, column, columns, TALL);
        for (; row < rows; row++)
            product_tile(p, row, column, columns, 1);
    }
}

#endif

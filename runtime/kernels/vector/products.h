/* Products of small float matrices. Include "vectors.h" before anything else. */
#ifndef SATCHEL_PRODUCTS_H
#define SATCHEL_PRODUCTS_H

#include "vectors.h"

/* A tile of rows and vectors: its sums and what they share are in registers. */
enum { TALL = PARTS == 1 ? 8 : 4, ABREAST = PARTS == 1 ? 2 : 1 };

/* Small matrix products: c[r] = keep[r] c[r] + sum over j of a[r, j] b[j]. */
typedef struct {
    const float *a, *b, *keep; /* keep NULL: c is not read */
    float *c;
    int64_t inner, a_row, a_column, b_row, c_row;
} Product;

INLINE void product_tile(const int height, const bool whole, const Product *p, int64_t row, int64_t column, int64_t left)
{
    const float *a = p->a + row * p->a_row, *b = p->b + column;
    float *c = p->c + row * p->c_row + column;
    F16 sum[TALL][ABREAST];
    UNROLL for (int r = 0; r < height; r++)
        UNROLL for (int v = 0; v < ABREAST; v++)
            sum[r][v] = p->keep == NULL ? floats(0)
                                        : mul(floats(p->keep[row + r]),
                                              load_up_to(whole, c + r * p->c_row + v * LANES, left - v * LANES));
    for (int64_t j = 0; j < p->inner; j++) {
        F16 shared[ABREAST];
        UNROLL for (int v = 0; v < ABREAST; v++)
            shared[v] = load_up_to(whole, b + j * p->b_row + v * LANES, left - v * LANES);
        UNROLL for (int r = 0; r < height; r++) {
            const F16 weight = floats(a[r * p->a_row + j * p->a_column]);
            UNROLL for (int v = 0; v < ABREAST; v++)
                sum[r][v] = mul_add(weight, shared[v], sum[r][v]);
        }
    }
    UNROLL for (int r = 0; r < height; r++)
        UNROLL for (int v = 0; v < ABREAST; v++)
            store_up_to(whole, c + r * p->c_row + v * LANES, left - v * LANES, sum[r][v]);
}

INLINE void product_rows(const bool whole, const Product *p, int64_t rows, int64_t column, int64_t left)
{
    int64_t row = 0;
    for (; row + TALL <= rows; row += TALL)
        product_tile(TALL, whole, p, row, column, left);
    for (; row < rows; row++)
        product_tile(1, whole, p, row, column, left);
}

/* Each number is one sum in the order of j, whatever the sizes. */
static void multiply(const Product *p, int64_t rows, int64_t columns)
{
    int64_t column = 0;
    for (; column + ABREAST * LANES <= columns; column += ABREAST * LANES)
        product_rows(true, p, rows, column, ABREAST * LANES);
    if (column < columns)
        product_rows(false, p, rows, column, columns - column);
}

#endif

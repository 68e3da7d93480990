/* Integer sums of a tile of an even number of rows, by products of two rows and two outputs. */
#include "vectors.h"

#define PAIR(r) \
    if (2 * (r) < tile.rows) \
        a##r = row_pair(o->a + 2 * (r) * o->stride + i, o->a + (2 * (r) + 1) * o->stride + i);
#define ADD_PAIR(r, c, d)                                \
    if (2 * (r) < tile.rows) {                           \
        SUM(r, c) = add_pairs(SUM(r, c), low, a##r);     \
        SUM(r, d) = add_pairs(SUM(r, d), high, a##r);    \
    }
/* Column c has two sums of each pair of rows: of its first two outputs and of its last two. */
#define ADD_PAIRS(column, c, d)                                                                                       \
    if (column < columns) {                                                                                           \
        const Column inputs = low_column(tile.bits, COLUMN(column));                                                  \
        const Column next = tile.bits == 4 ? high_column(COLUMN(column)) : low_column(8, COLUMN(column) + more);      \
        const Column low = output_pair(0, inputs, next), high = output_pair(1, inputs, next);                         \
        ADD_PAIR(0, c, d)                                                                                             \
        ADD_PAIR(1, c, d)                                                                                             \
        ADD_PAIR(2, c, d)                                                                                             \
    }
#define KEEP_PAIR(r, column, c, d)                                             \
    if (2 * (r) < tile.rows && column < columns) {                             \
        sums[2 * (r)][column] = row_of_pairs(0, SUM(r, c), SUM(r, d));         \
        sums[2 * (r) + 1][column] = row_of_pairs(1, SUM(r, c), SUM(r, d));     \
    }
#define KEEP_PAIRS(r) KEEP_PAIR(r, 0, 0, 1) KEEP_PAIR(r, 1, 2, 3) KEEP_PAIR(r, 2, 4, 5) KEEP_PAIR(r, 3, 6, 7)
#define EIGHT_SUMS(r) FOUR_SUMS(r), SUM(r, 4) = {0}, SUM(r, 5) = {0}, SUM(r, 6) = {0}, SUM(r, 7) = {0}

/* A step is of 8 inputs. Where only 4 are left, what is multiplied by the others is zero. */
INLINE void sum_many(const LinearTile tile, const Operands *o, PartI (*sums)[MOST_COLUMNS])
{
    const int parts = parts_at_once(tile), columns = parts * tile.width;
    RowPair a0 = {0}, a1 = a0, a2 = a0;
    EIGHT_SUMS(0);
    EIGHT_SUMS(1);
    EIGHT_SUMS(2);
    for (int64_t i = o->from; i < o->end; i += 8) {
        const uint8_t *b = o->b + i * (tile.bits == 4 ? 8 : 16);
        const int64_t more = i + 4 < o->end ? BYTES : 0;
        fetch_next(tile, o, i, 8);
        PAIR(0)
        PAIR(1)
        PAIR(2)
        ADD_PAIRS(0, 0, 1)
        ADD_PAIRS(1, 2, 3)
        ADD_PAIRS(2, 4, 5)
        ADD_PAIRS(3, 6, 7)
    }
    KEEP_PAIRS(0)
    KEEP_PAIRS(1)
    KEEP_PAIRS(2)
}

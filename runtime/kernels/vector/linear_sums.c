/* Integer sums of a tile of a linear layer: a few rows times a few columns, which are native vectors of outputs. */
#include "vectors.h"

#include <stdbool.h>

#include "../linear.h"

enum {
    FEW_ROWS = 2, /* at most these, and a tile is bound by the reading of weights */
    MOST_ROWS = TILE_ROWS > FEW_ROWS ? TILE_ROWS : FEW_ROWS,
    MOST_SUMS = 2 * MOST_ROWS,
    /* Sums of as many fine words and unsigned weights fit 32 bits: 256 * 32512 * 255 is below 2^31. */
    FINE_INPUTS = 256,
    MOST_PANELS = 4,
    MOST_COLUMNS = 8,
    PART_BYTES = BYTES / PARTS, /* of weights: 4 inputs of each output of a column */
    PLACES_OF_8_BITS = WORDS ? 2 : 1, /* of a row, for weights of 8 bits */
};

/* Inner products of columns, unless the instruction set has its own. */
#if !WORDS
#define columns_at_once(bits, channel, rows) \
    ((rows) <= FEW_ROWS ? FEW_COLUMNS : (channel) ? CHANNEL_COLUMNS : BLOCK_COLUMNS)
typedef Weights Column;
typedef PartI Sum;
INLINE Column low_column(const int bits, const uint8_t *x) { return bits == 4 ? low_4_bits(x) : weights_of_8_bits(x); }
INLINE Column high_column(const uint8_t *x) { return high_4_bits(x); }
INLINE Sum add_products(const int bits, Sum sum, Column weights, PartI activation)
{
    (void)bits;
    return add_dot(sum, weights, activation);
}
INLINE PartI finished(const int bits, Sum sum)
{
    (void)bits;
    return sum;
}
/* As many inputs of one output as a vector has bytes, and their products. */
typedef Weights Run;
INLINE Run load_run(const uint8_t *x) { return weights_of_8_bits(x); }
INLINE PartI add_run(PartI sum, Run weights, const int8_t *values)
{
    PartI x;
    memcpy(&x, values, sizeof x);
    return add_dot(sum, weights, x);
}
#endif
#ifndef NARROW_INPUTS
#define NARROW_INPUTS INT64_MAX /* of 4-bit weights: until sums must be widened */
#endif

INLINE bool is_words(const int bits) { return WORDS && bits == 8; }

/* What is subtracted from weights as they are read. */
INLINE int32_t read_less(const int bits) { return bits == 4 ? 0 : LESS; }

/* What is known of a tile when it is compiled: `rows` rows times `width` panels, whose parts are computed a few at a
 * time. With `channel` there is one block; with `fine` the values of rows have 16 bits, and are words or two rows of bytes. */
typedef struct {
    int rows, width, bits;
    bool channel, fine;
} LinearTile;

/* Columns that fit in registers, and the parts of each panel that they are. */
INLINE int most_columns(const LinearTile tile) { return columns_at_once(tile.bits, tile.channel, tile.rows); }

INLINE int parts_at_once(const LinearTile tile)
{
    const int most = most_columns(tile) / tile.width;
    return most > PARTS ? PARTS : most;
}

/* Outputs of the tile for each column, and the places of a row of the tile, and of an output, among quantized rows. */
INLINE int outputs_of(const LinearTile tile) { return tile.fine && !WORDS ? tile.rows / 2 : tile.rows; }
INLINE int places_of_row(const LinearTile tile) { return tile.bits == 8 ? PLACES_OF_8_BITS : 1; }
INLINE int places_of_output(const LinearTile tile) { return tile.fine || is_words(tile.bits) ? 2 : 1; }

/* Four inputs of a row, from input `at` on, for each output. */
INLINE PartI four_inputs(const LinearTile tile, const int8_t *row, int64_t at)
{
#if WORDS
    if (is_words(tile.bits))
        return (PartI)four_words(row + 2 * at);
#endif
    (void)tile;
    int32_t four;
    memcpy(&four, row + at, sizeof four);
    return four - (PartI){0};
}

/* Operands of a tile: rows are `stride` bytes apart, panels `apart`, and inputs are from `from` to `end`. Unless `next` is
 * NULL, as many bytes from there on are fetched on the way as are read of weights: processors do not fetch ahead across
 * pages by themselves, and what is fetched in a burst waits for memory. */
typedef struct {
    const int8_t *a;
    const uint8_t *b; /* weights of the first column */
    int64_t stride, apart, from, end;
    const uint8_t *next;
} Operands;

/* At input `at` of a step of `inputs`. Whole panels are fetched side by side, as they will be read. */
INLINE void fetch_next(const LinearTile tile, const Operands *o, int64_t at, const int inputs)
{
    const int parts = parts_at_once(tile), beside = parts == PARTS ? tile.width : 1;
    const int each = parts * tile.width / beside * PART_BYTES * tile.bits / 32; /* bytes of an input */
    if (o->next != NULL)
        UNROLL
        for (int p = 0; p < beside; p++)
            for (int byte = 0; byte < each * inputs; byte += BYTES)
                __builtin_prefetch(o->next + p * o->apart + at * each + byte, 0, 2);
}

/* Each sum is a variable of its own, SUM(row, column): compilers keep arrays of them in memory. */
#define SUM(r, c) sum_##r##_##c
#define FOUR_SUMS(r) Sum SUM(r, 0) = {0}, SUM(r, 1) = {0}, SUM(r, 2) = {0}, SUM(r, 3) = {0}
#define ADD(r, c, weights, activation) SUM(r, c) = add_products(tile.bits, SUM(r, c), weights, activation)
#define COLUMN(c) (b + (c) / parts * o->apart + (c) % parts * PART_BYTES)
#define FOR_4(what, ...) what(0, __VA_ARGS__) what(1, __VA_ARGS__) what(2, __VA_ARGS__) what(3, __VA_ARGS__)
#define FOR_8(what, ...) \
    FOR_4(what, __VA_ARGS__) what(4, __VA_ARGS__) what(5, __VA_ARGS__) what(6, __VA_ARGS__) what(7, __VA_ARGS__)
#define FOR_6(what, ...) FOR_4(what, __VA_ARGS__) what(4, __VA_ARGS__) what(5, __VA_ARGS__)

#define KEEP(c, r)                   \
    if (r < tile.rows && c < columns) \
        sums[r][c] = finished(tile.bits, SUM(r, c));

/* Integer sums of a tile of many rows. */
#ifdef ROW_PAIRS
#include "linear_pairs.c"
#else
#define READ(c, _)                                                      \
    if (c < columns)                                  \
        w##c = low_column(tile.bits, COLUMN(c));      \
    if (c < columns && tile.bits == 4)                \
        next##c = high_column(COLUMN(c));
#define ADD_ROW(r, at, weights)                                          \
    if (r < tile.rows) {                                                 \
        const PartI activation = four_inputs(tile, o->a + r * o->stride, at); \
        ADD(r, 0, weights##0, activation);                               \
        if (columns > 1)                                                 \
            ADD(r, 1, weights##1, activation);                           \
        if (columns > 2)                                                 \
            ADD(r, 2, weights##2, activation);                           \
        if (columns > 3)                                                 \
            ADD(r, 3, weights##3, activation);                           \
    }
#define KEEP_ROW(r, _) KEEP(0, r) KEEP(1, r) KEEP(2, r) KEEP(3, r)

/* A step is of 8 inputs if weights have 4 bits. */
INLINE void sum_many(const LinearTile tile, const Operands *o, PartI (*sums)[MOST_COLUMNS])
{
    const int parts = parts_at_once(tile), columns = parts * tile.width;
    Column w0 = {0}, w1 = w0, w2 = w0, w3 = w0, next0 = w0, next1 = w0, next2 = w0, next3 = w0;
    FOUR_SUMS(0);
    FOUR_SUMS(1);
    FOUR_SUMS(2);
    FOUR_SUMS(3);
    FOUR_SUMS(4);
    FOUR_SUMS(5);
    for (int64_t i = o->from; i < o->end; i += tile.bits == 4 ? 8 : 4) {
        const uint8_t *b = o->b + i * (tile.bits == 4 ? 8 : 16);
        fetch_next(tile, o, i, tile.bits == 4 ? 8 : 4);
        FOR_4(READ, _)
        FOR_6(ADD_ROW, i, w)
        if (tile.bits == 4) {
            FOR_6(ADD_ROW, i + 4, next)
        }
    }
    FOR_6(KEEP_ROW, _)
}
#endif

/* The same of one or two rows, column by column. Except with `channel` or words a step is of 8 inputs; a single row then
 * has two sums, so that steps do not wait for each other. */
#define ADD_FEW(c, _)                                                                            \
    if (c < columns) {                                                                           \
        const Column first = low_column(tile.bits, COLUMN(c));                                   \
        ADD(0, c, first, a0);                                                                    \
        if (tile.rows == 2)                                                                      \
            ADD(1, c, first, a1);                                                                \
        if (pairs) {                                                                             \
            const Column second                                                                  \
                = tile.bits == 4 ? high_column(COLUMN(c)) : low_column(8, COLUMN(c) + BYTES);    \
            ADD(1, c, second, next1);                                                            \
            if (tile.rows == 2)                                                                  \
                ADD(0, c, second, next0);                                                        \
        }                                                                                        \
    }
#define KEEP_FEW(c, _)                                   \
    KEEP(c, 0)                                           \
    KEEP(c, 1)                                           \
    if (c < columns && pairs && tile.rows == 1)          \
        sums[0][c] += finished(tile.bits, SUM(1, c));
INLINE void sum_few(const LinearTile tile, const Operands *o, PartI (*sums)[MOST_COLUMNS])
{
    const int parts = parts_at_once(tile), columns = parts * tile.width;
    const bool pairs = !tile.channel && !is_words(tile.bits);
    const int8_t *second_row = o->a + (tile.rows == 2 ? o->stride : 0);
    FOUR_SUMS(0);
    FOUR_SUMS(1);
    Sum SUM(0, 4) = {0}, SUM(0, 5) = {0}, SUM(0, 6) = {0}, SUM(0, 7) = {0};
    Sum SUM(1, 4) = {0}, SUM(1, 5) = {0}, SUM(1, 6) = {0}, SUM(1, 7) = {0};
    for (int64_t i = o->from; i < o->end; i += pairs ? 8 : 4) {
        const uint8_t *b = o->b + i * (tile.bits == 4 ? 8 : 16);
        const PartI a0 = four_inputs(tile, o->a, i), a1 = four_inputs(tile, second_row, i);
        const PartI next0 = pairs ? four_inputs(tile, o->a, i + 4) : a0;
        const PartI next1 = pairs ? four_inputs(tile, second_row, i + 4) : a1;
        fetch_next(tile, o, i, pairs ? 8 : 4);
        FOR_8(ADD_FEW, _)
    }
    FOR_8(KEEP_FEW, _)
}

INLINE void sum_inputs(const LinearTile tile, const Operands *o, PartI (*sums)[MOST_COLUMNS])
{
    if (tile.rows <= FEW_ROWS)
        sum_few(tile, o, sums);
    else
        sum_many(tile, o, sums);
}

/* Integer sums of a tile. Of fine rows they are pairs: 256 * first + second. */
INLINE void sum_products(const LinearTile tile, Operands o, PartI (*sums)[MOST_COLUMNS])
{
    const int columns = parts_at_once(tile) * tile.width;
    const bool pairs = tile.fine && WORDS;
    const int64_t end = o.end, most = pairs ? FINE_INPUTS : tile.bits == 4 ? NARROW_INPUTS : INT64_MAX;
    if (most == INT64_MAX) {
        sum_inputs(tile, &o, sums);
        return;
    }
    memset(sums, 0, (pairs ? 2 : 1) * tile.rows * sizeof *sums);
    for (; o.from < end; o.from = o.end) {
        PartI some[MOST_ROWS][MOST_COLUMNS];
        o.end = end - o.from > most ? o.from + most : end;
        sum_inputs(tile, &o, some);
        UNROLL
        for (int r = 0; r < tile.rows; r++)
            UNROLL
            for (int c = 0; c < columns; c++)
                if (pairs) {
                    sums[2 * r][c] += some[r][c] >> 8;
                    sums[2 * r + 1][c] += some[r][c] & 255;
                } else {
                    sums[r][c] += some[r][c];
                }
    }
}

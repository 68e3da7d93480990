/* Tiles of a linear layer: sums of a few rows times a few columns, which are native vectors of outputs. */
#include "vectors.h"

#include <stdbool.h>

#include "gates.h"
#include "../linear.h"

enum {
    FEW_ROWS = 2, /* at most these, and a tile is bound by the reading of weights */
    MOST_ROWS = TILE_ROWS > FEW_ROWS ? TILE_ROWS : FEW_ROWS,
    MOST_PANELS = 4,
    MOST_COLUMNS = 8,
    PART_BYTES = BYTES / PARTS, /* of weights: 4 inputs of each output of a column */
};

/* Quantized rows that are multiplied together: one per row of the call, or two where its quantization error is quantized
 * as well. */
typedef struct {
    int64_t from, end; /* quantized rows */
    int64_t row;       /* of the call: the first */
    bool twice;
} Part;

typedef struct {
    const LinearParams *params;
    const LinearCall *call;
    int8_t *activations; /* [quantized rows, row_bytes] */
    float *scales;       /* [quantized rows, row_scales] */
    int32_t *sums;       /* the same */
    float *scratch;      /* [row tasks, row_bytes] */
    int64_t *places;     /* [rows + 1]: the first quantized row of each row */
    Part *parts;
    int64_t width; /* panels of a task */
    size_t groups; /* tasks that cover the panels */
} LinearWork;

/* What is known of a tile when it is compiled: `rows` rows times `width` panels, whose parts are computed a few at a
 * time. With `channel` there is one block; with `twice`, pairs of rows are added. */
typedef struct {
    int rows, width, bits;
    bool channel, twice;
} LinearTile;

/* Parts of each panel that a tile computes at a time: as many columns as fit in registers. */
INLINE int parts_at_once(const LinearTile tile)
{
    const int most = tile.rows <= FEW_ROWS ? FEW_COLUMNS : tile.channel ? CHANNEL_COLUMNS : BLOCK_COLUMNS;
    return most / tile.width > PARTS ? PARTS : most / tile.width;
}

/* Stores 16 outputs of a row, starting at 16 * column, out of `count`. */
INLINE void put(const LinearWork *work, int64_t row, int64_t column, int64_t count, F16 value)
{
    const int64_t first = column * LANES;
    const LinearCall *call = work->call;
    if (call->residual != NULL)
        value = add(value, load_some(call->residual + row * count + first, count - first));
    store_some(call->y + row * count + first, count - first, value);
}

INLINE F16 bias(const LinearWork *work, int64_t first, int64_t end)
{
    const float *values = work->call->bias;
    return values == NULL ? floats(0) : load_some(values + first, end - first);
}

/* Turns the sums of a tile into outputs, of rows from `out` on. Gate panels come in pairs. */
INLINE void finish(const LinearTile tile, const LinearWork *work, int64_t out, int64_t panel, F16 (*product)[MOST_PANELS])
{
    const LinearParams *params = work->params;
    const int64_t count = half_outputs(params);
    const int rows = tile.twice ? tile.rows / 2 : tile.rows;
    if (tile.twice)
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int p = 0; p < tile.width; p++)
                product[r][p] = add(product[2 * r][p], product[2 * r + 1][p]);
    if (params->gate != GATE_NONE) {
        UNROLL
        for (int p = 0; p + 1 < tile.width; p += 2) {
            const int64_t column = (panel + p) / 2;
            const F16 low = bias(work, column * LANES, count), high = bias(work, count + column * LANES, 2 * count);
            UNROLL
            for (int r = 0; r < rows; r++) {
                const F16 gate = activate(params->gate, add(product[r][p], low));
                put(work, out + r, column, count, mul(gate, add(product[r][p + 1], high)));
            }
        }
        return;
    }
    UNROLL
    for (int p = 0; p < tile.width; p++) {
        const F16 added = bias(work, (panel + p) * LANES, count);
        UNROLL
        for (int r = 0; r < rows; r++)
            put(work, out + r, panel + p, count, add(product[r][p], added));
    }
}

INLINE PartI four_inputs(const int8_t *values)
{
    int32_t four;
    memcpy(&four, values, sizeof four);
    return four - (PartI){0};
}

/* Operands of a tile: rows are `stride` bytes apart, panels `apart`, and inputs are from `from` to `end`. With `ahead` the
 * panels that come next are fetched on the way: processors do not fetch ahead across pages by themselves. */
typedef struct {
    const int8_t *a;
    const uint8_t *b; /* weights of the first column */
    int64_t stride, apart, from, end;
    bool ahead;
} Operands;

INLINE void fetch_ahead(const LinearTile tile, const Operands *o, const uint8_t *b, const int bytes)
{
    if (o->ahead)
        UNROLL
        for (int p = tile.width; p < 2 * tile.width; p++)
            for (int byte = 0; byte < bytes; byte += BYTES)
                __builtin_prefetch(b + p * o->apart + byte, 0, 2);
}

/* 4-bit weights may have sums of 16 bits, which are widened before they overflow. */
#ifndef NARROW_INPUTS
#define NARROW_INPUTS INT64_MAX
#define add_narrow_dot add_dot
#define widened(sum) (sum)
#endif

INLINE PartI add_products(const int bits, PartI sum, Weights weights, PartI activation)
{
    return bits == 4 ? add_narrow_dot(sum, weights, activation) : add_dot(sum, weights, activation);
}

INLINE PartI finished(const int bits, PartI sum) { return bits == 4 ? widened(sum) : sum; }

/* Each sum is a variable of its own, SUM(row, column): compilers keep arrays of them in memory. */
#define SUM(r, c) sum_##r##_##c
#define FOUR_SUMS(r) PartI SUM(r, 0) = {0}, SUM(r, 1) = {0}, SUM(r, 2) = {0}, SUM(r, 3) = {0}
#define ADD(r, c, weights, activation) SUM(r, c) = add_products(tile.bits, SUM(r, c), weights, activation)
#define COLUMN(c) (b + (c) / parts * o->apart + (c) % parts * PART_BYTES)
#define FOR_4(what, ...) what(0, __VA_ARGS__) what(1, __VA_ARGS__) what(2, __VA_ARGS__) what(3, __VA_ARGS__)
#define FOR_8(what, ...) \
    FOR_4(what, __VA_ARGS__) what(4, __VA_ARGS__) what(5, __VA_ARGS__) what(6, __VA_ARGS__) what(7, __VA_ARGS__)
#define FOR_6(what, ...) FOR_4(what, __VA_ARGS__) what(4, __VA_ARGS__) what(5, __VA_ARGS__)

#define READ(c, _)                                                      \
    if (c < columns && tile.bits == 4)                                  \
        w##c = low_4_bits(COLUMN(c)), next##c = high_4_bits(COLUMN(c)); \
    else if (c < columns)                                               \
        w##c = weights_of_8_bits(COLUMN(c));
#define ADD_ROW(r, at, weights)                                          \
    if (r < tile.rows) {                                                 \
        const PartI activation = four_inputs(o->a + r * o->stride + at); \
        ADD(r, 0, weights##0, activation);                               \
        if (columns > 1)                                                 \
            ADD(r, 1, weights##1, activation);                           \
        if (columns > 2)                                                 \
            ADD(r, 2, weights##2, activation);                           \
        if (columns > 3)                                                 \
            ADD(r, 3, weights##3, activation);                           \
    }
#define KEEP(c, r)                   \
    if (r < tile.rows && c < columns) \
        sums[r][c] = finished(tile.bits, SUM(r, c));
#define KEEP_ROW(r, _) KEEP(0, r) KEEP(1, r) KEEP(2, r) KEEP(3, r)

/* Integer sums of a tile of many rows. A step is of 8 inputs if weights have 4 bits. */
INLINE void sum_many(const LinearTile tile, const Operands *o, PartI (*sums)[MOST_COLUMNS])
{
    const int parts = parts_at_once(tile), columns = parts * tile.width;
    Weights w0 = {0}, w1 = w0, w2 = w0, w3 = w0, next0 = w0, next1 = w0, next2 = w0, next3 = w0;
    FOUR_SUMS(0);
    FOUR_SUMS(1);
    FOUR_SUMS(2);
    FOUR_SUMS(3);
    FOUR_SUMS(4);
    FOUR_SUMS(5);
    for (int64_t i = o->from; i < o->end; i += tile.bits == 4 ? 8 : 4) {
        const uint8_t *b = o->b + i * (tile.bits == 4 ? 8 : 16);
        fetch_ahead(tile, o, b, BYTES);
        FOR_4(READ, _)
        FOR_6(ADD_ROW, i, w)
        if (tile.bits == 4) {
            FOR_6(ADD_ROW, i + 4, next)
        }
    }
    FOR_6(KEEP_ROW, _)
}

/* The same of one or two rows, column by column. Except with `channel` a step is of 8 inputs; a single row then has two
 * sums, so that steps do not wait for each other. */
#define ADD_FEW(c, _)                                                                            \
    if (c < columns) {                                                                           \
        const Weights first = tile.bits == 4 ? low_4_bits(COLUMN(c)) : weights_of_8_bits(COLUMN(c)); \
        ADD(0, c, first, a0);                                                                    \
        if (tile.rows == 2)                                                                      \
            ADD(1, c, first, a1);                                                                \
        if (pairs) {                                                                             \
            const Weights second = tile.bits == 4 ? high_4_bits(COLUMN(c)) : weights_of_8_bits(COLUMN(c) + BYTES); \
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
    const bool pairs = !tile.channel;
    const int8_t *second_row = o->a + (tile.rows == 2 ? o->stride : 0);
    FOUR_SUMS(0);
    FOUR_SUMS(1);
    PartI SUM(0, 4) = {0}, SUM(0, 5) = {0}, SUM(0, 6) = {0}, SUM(0, 7) = {0};
    PartI SUM(1, 4) = {0}, SUM(1, 5) = {0}, SUM(1, 6) = {0}, SUM(1, 7) = {0};
    for (int64_t i = o->from; i < o->end; i += pairs ? 8 : 4) {
        const uint8_t *b = o->b + i * (tile.bits == 4 ? 8 : 16);
        const PartI a0 = four_inputs(o->a + i), a1 = four_inputs(second_row + i);
        const PartI next0 = pairs ? four_inputs(o->a + i + 4) : a0, next1 = pairs ? four_inputs(second_row + i + 4) : a1;
        fetch_ahead(tile, o, b, pairs && tile.bits == 8 ? 2 * BYTES : BYTES);
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

/* Integer sums of a tile. */
INLINE void sum_products(const LinearTile tile, Operands o, PartI (*sums)[MOST_COLUMNS])
{
    const int columns = parts_at_once(tile) * tile.width;
    const int64_t end = o.end;
    const bool narrow = tile.bits == 4 && end - o.from > NARROW_INPUTS;
    if (narrow)
        o.end = o.from + NARROW_INPUTS;
    sum_inputs(tile, &o, sums);
    while (narrow && o.end < end) {
        PartI more[MOST_ROWS][MOST_COLUMNS];
        o.from = o.end;
        o.end = end - o.from > NARROW_INPUTS ? o.from + NARROW_INPUTS : end;
        sum_inputs(tile, &o, more);
        UNROLL
        for (int r = 0; r < tile.rows; r++)
            UNROLL
            for (int c = 0; c < columns; c++)
                sums[r][c] += more[r][c];
    }
}

/* Numbers of a column of block `block`: scales or zero points, at this place. */
INLINE int64_t column_place(const LinearTile tile, int64_t panel, int64_t blocks, int64_t block, int part, int column)
{
    const int parts = parts_at_once(tile);
    return ((panel + column / parts) * blocks + block) * LANES + (part + column % parts) * PART_LANES;
}

/* Products of a tile's rows and of parts from `part` on of its panels. Weights are unsigned: the zero point times the sum
 * of the activations is subtracted from each block's sum. Sums of a block are integers, and blocks are added in order, so
 * the result of a row does not depend on the tile. */
INLINE void multiply_parts(const LinearTile tile, const LinearWork *work, int64_t row, int64_t panel, const int part,
                           F16 (*product)[MOST_PANELS])
{
    const LinearParams *params = work->params;
    const LinearCall *call = work->call;
    const int parts = parts_at_once(tile), columns = parts * tile.width;
    const int64_t blocks = tile.channel ? 1 : row_scales(&params->row), apart = panel_bytes(params);
    const int64_t inputs = tile.channel ? (params->row.inputs + 3) / 4 * 4 : params->row.block;
    const int64_t stride = row_bytes(&params->row);
    const int32_t less = tile.bits == 4 ? 0 : LESS, middle = (tile.bits == 4 ? 8 : 128) - less;
    const bool own_zeros = !tile.channel && call->zero_points != NULL;
    PartF total[MOST_ROWS][MOST_COLUMNS];
    UNROLL
    for (int r = 0; r < tile.rows; r++)
        UNROLL
        for (int c = 0; c < columns; c++)
            total[r][c] = (PartF){0};
    for (int64_t block = 0; block < blocks; block++) {
        PartI sum[MOST_ROWS][MOST_COLUMNS];
        sum_products(tile,
                     (Operands){.a = work->activations + row * stride,
                                .b = call->weights + panel * apart + part * PART_BYTES,
                                .stride = stride,
                                .apart = apart,
                                .from = block * inputs,
                                .end = (block + 1) * inputs,
                                .ahead = part == 0},
                     sum);
        UNROLL
        for (int c = 0; c < columns; c++) {
            const int64_t place = column_place(tile, panel, blocks, block, part, c);
            PartF scale;
            memcpy(&scale, call->scales + place, sizeof scale);
            PartI zeros = {0};
            if (own_zeros)
                zeros = part_load_unsigned(call->zero_points + place) - less;
            UNROLL
            for (int r = 0; r < tile.rows; r++) {
                const int64_t at = (row + r) * blocks + block;
                const int32_t ones = work->sums[at];
                const PartI offset = own_zeros ? zeros * ones : middle * ones - (PartI){0};
                const PartF whole = __builtin_convertvector(sum[r][c] - offset, PartF);
                const PartF both = scale * work->scales[at];
                total[r][c] = tile.channel ? whole * both : part_fma(whole, both, total[r][c]);
            }
        }
    }
    UNROLL
    for (int r = 0; r < tile.rows; r++)
        UNROLL
        for (int c = 0; c < columns; c++)
            product[r][c / parts].part[part + c % parts] = total[r][c];
}

INLINE void linear_tile(const LinearTile tile, const LinearWork *work, int64_t row, int64_t out, int64_t panel)
{
    F16 product[MOST_ROWS][MOST_PANELS];
    UNROLL
    for (int part = 0; part < PARTS; part += parts_at_once(tile))
        multiply_parts(tile, work, row, panel, part, product);
    finish(tile, work, out, panel, product);
}

/* The rows of a part times `width` panels, in tiles of a few sizes. */
INLINE void strip(const int width, const int bits, const bool channel, const bool twice, const LinearWork *work,
                  const Part *part, int64_t panel)
{
    const LinearTile tile = {TILE_ROWS, width, bits, channel, twice};
    LinearTile middle = tile, small = tile, smallest = tile;
    const int each = twice ? 2 : 1;
    int64_t row = part->from, out = part->row;
    middle.rows = FEWER_ROWS;
    small.rows = twice ? 2 : SMALL_ROWS;
    smallest.rows = each;
    for (; row + tile.rows <= part->end; row += tile.rows, out += tile.rows / each)
        linear_tile(tile, work, row, out, panel);
    if (FEWER_ROWS < TILE_ROWS)
        for (; row + middle.rows <= part->end; row += middle.rows, out += middle.rows / each)
            linear_tile(middle, work, row, out, panel);
    for (; row + small.rows <= part->end; row += small.rows, out += small.rows / each)
        linear_tile(small, work, row, out, panel);
    for (; row < part->end; row += smallest.rows, out++)
        linear_tile(smallest, work, row, out, panel);
}

typedef void Strip(const LinearWork *work, const Part *part, int64_t panel);

#define STRIP(name, width, bits, channel, twice)                              \
    static void name(const LinearWork *work, const Part *part, int64_t panel) \
    {                                                                         \
        strip(width, bits, channel, twice, work, part, panel);                \
    }
STRIP(channel_2, 2, 8, true, false)
STRIP(channel_1, 1, 8, true, false)
STRIP(twice_2, 2, 8, true, true)
STRIP(twice_1, 1, 8, true, true)
STRIP(eight_2, 2, 8, false, false)
STRIP(eight_1, 1, 8, false, false)
STRIP(four_2, 2, 4, false, false)
STRIP(four_1, 1, 4, false, false)

/* For each quantization: strips of 4 panels (NULL if the sums do not fit in registers), 2 and 1. */
#ifdef WIDE_STRIPS
STRIP(channel_4, 4, 8, true, false)
STRIP(twice_4, 4, 8, true, true)
#else
#define channel_4 NULL
#define twice_4 NULL
#endif
static Strip *const CHANNEL[] = {channel_4, channel_2, channel_1}, *const TWICE[] = {twice_4, twice_2, twice_1};
static Strip *const EIGHT[] = {NULL, eight_2, eight_1}, *const FOUR[] = {NULL, four_2, four_1};

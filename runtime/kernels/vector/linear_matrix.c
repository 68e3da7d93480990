/* Many rows of a linear layer by a processor's matrix products: 16 rows of up to 64 activations times as many weights of a
 * panel's 16 outputs, which lie there as the instruction wants them. Sums are those of linear_tile.c, and so are the bits. */
#include "vectors.h"

#include <string.h>

#include "../linear.h"

enum {
    SIDE = 16,          /* rows of a tile of activations, and outputs of one of weights */
    TILE_INPUTS = 64,   /* at most */
    LEAST_INPUTS = 32,  /* with fewer, vectors are about as fast */
    LEAST_PLACES = 8,   /* with fewer, a layer is bound by the reading of weights */
    MOST_WIDENED = 256, /* inputs of a block of 4-bit weights, which become bytes */
    TILE_PANELS = 2,
};

/* What a processor reads when its tiles get their shapes: of 0 to 3, sums; 4 and 5, rows; 6 and 7, panels. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

/* Inputs of a tile: they divide a block. 0: tiles would be too small. */
static int64_t tile_inputs(const LinearParams *params)
{
    const int64_t block = params->row.block;
    int64_t inputs = block != 0 && block < TILE_INPUTS ? block : TILE_INPUTS;
    while (inputs >= LEAST_INPUTS && block % inputs != 0)
        inputs -= 4;
    return inputs < LEAST_INPUTS || (params->bits == 4 && block > MOST_WIDENED) ? 0 : inputs;
}

/* Places of a part, from its first on, that tiles multiply. The last tile may reach beyond the part. */
static int64_t matrix_places(const LinearParams *params, const Part *part)
{
    const int64_t places = part->end - part->from, rest = places % SIDE;
    return tile_inputs(params) == 0 ? 0 : rest < LEAST_PLACES ? places - rest : places;
}

/* Gives tiles the shapes for a part, and returns whether they are used: they are then to be released. */
static bool configure_tiles(const LinearParams *params, const Part *part)
{
    const int64_t inputs = tile_inputs(params);
    TileShapes shapes = {.palette = 1};
    if (matrix_places(params, part) == 0)
        return false;
    for (int tile = 0; tile < 8; tile++) {
        shapes.rows[tile] = (uint8_t)(tile < 6 ? SIDE : inputs / 4);
        shapes.row_bytes[tile] = (uint16_t)(tile < 4 || tile > 5 ? BYTES : inputs);
    }
    TILE_CONFIGURE(&shapes);
    return true;
}

/* Weights of a block of a panel as bytes: where they are, or widened to `bytes`; those `apart` from them are fetched. */
INLINE const uint8_t *block_bytes(const int bits, const uint8_t *panel, int64_t first, int64_t inputs, int64_t apart,
                                  uint8_t *bytes)
{
    const uint8_t *packed = panel + first * SIDE / 2;
    if (bits == 8)
        return panel + first * SIDE;
    for (int64_t at = 0; at < inputs * SIDE / 2; at += BYTES) {
        __builtin_prefetch(packed + apart + at, 0, 2);
        EACH_PART {
            const Weights low = low_4_bits(packed + at + i * PART_BYTES), high = high_4_bits(packed + at + i * PART_BYTES);
            memcpy(bytes + 2 * at + i * PART_BYTES, &low, PART_BYTES);
            memcpy(bytes + 2 * at + BYTES + i * PART_BYTES, &high, PART_BYTES);
        }
    }
    return bytes;
}

/* Operands of two tiles of rows, or one, and of panels. A last tile with fewer inputs is in `last`, padded with zeros.
 * Unless `ahead` is 0, weights that are as far from those of `b` are fetched on the way. */
typedef struct {
    const int8_t *a;
    const uint8_t *b[TILE_PANELS];
    const uint8_t (*last)[TILE_INPUTS * SIDE];
    int64_t stride, inputs, step, ahead;
} TileOperands;

INLINE void sum_tiles(const bool tall, const bool wide, const TileOperands *o, int32_t (*sums)[TILE_PANELS][LANES])
{
    enum { APART = sizeof *sums };
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t i = 0; i < o->inputs; i += o->step) {
        const bool whole = i + o->step <= o->inputs;
        for (int64_t line = 0; o->ahead != 0 && line < o->step * SIDE; line += BYTES) {
            __builtin_prefetch(o->b[0] + o->ahead + i * SIDE + line, 0, 2);
            if (wide)
                __builtin_prefetch(o->b[1] + o->ahead + i * SIDE + line, 0, 2);
        }
        TILE_LOAD(6, whole ? o->b[0] + i * SIDE : o->last[0], BYTES);
        TILE_LOAD(4, o->a + i, o->stride);
        TILE_DOT(0, 4, 6);
        if (wide) {
            TILE_LOAD(7, whole ? o->b[1] + i * SIDE : o->last[1], BYTES);
            TILE_DOT(1, 4, 7);
        }
        if (tall) {
            TILE_LOAD(5, o->a + SIDE * o->stride + i, o->stride);
            TILE_DOT(2, 5, 6);
        }
        if (tall && wide)
            TILE_DOT(3, 5, 7);
    }
    TILE_STORE(0, sums[0][0], APART);
    if (wide)
        TILE_STORE(1, sums[0][1], APART);
    if (tall)
        TILE_STORE(2, sums[SIDE][0], APART);
    if (tall && wide)
        TILE_STORE(3, sums[SIDE][1], APART);
}

/* Adds the sums of a block and of `places` places, from `first` on, to the outputs of their rows. */
INLINE void add_sums(const LinearTile tile, const LinearWork *work, int64_t first, int64_t places, int64_t panel,
                     int64_t block, int32_t (*sums)[TILE_PANELS][LANES], F16 (*total)[TILE_PANELS])
{
    const int64_t blocks = tile.channel ? 1 : row_scales(&work->params->row), each = places_of_output(tile);
    const bool own_zeros = !tile.channel && work->call->zero_points != NULL;
    for (int p = 0; p < tile.width; p++)
        EACH_PART {
            const int64_t place = ((panel - work->first_panel + p) * blocks + block) * LANES + i * PART_LANES;
            const PartF scale = scales_at(work, tile.channel, place);
            const PartI zeros = zeros_at(work, tile.bits, own_zeros, place);
            for (int64_t row = 0; row < places; row += each) {
                PartI sum, lower;
                PartF *sum_of_row = &total[row / each][p].part[i];
                memcpy(&sum, sums[row][p] + i * PART_LANES, sizeof sum);
                memcpy(&lower, sums[row + each - 1][p] + i * PART_LANES, sizeof lower);
                *sum_of_row = add_block(tile, work, (first + row) * blocks + block, own_zeros, zeros, scale, sum, lower,
                                        *sum_of_row);
            }
        }
}

INLINE void multiply_matrix(const LinearTile tile, const LinearWork *work, const Part *part, int64_t places, int64_t panel)
{
    _Alignas(BYTES) int32_t sums[2 * SIDE][TILE_PANELS][LANES];
    _Alignas(BYTES) uint8_t bytes[TILE_PANELS][MOST_WIDENED * SIDE], last[TILE_PANELS][TILE_INPUTS * SIDE];
    F16 total[MULTIPLIED_ROWS][TILE_PANELS], product[1][MOST_PANELS];
    const LinearParams *params = work->params;
    const int64_t blocks = tile.channel ? 1 : row_scales(&params->row), apart = panel_bytes(params);
    const int64_t inputs = tile.channel ? (params->row.inputs + 3) / 4 * 4 : params->row.block;
    const int64_t stride = row_bytes(&params->row), each = places_of_output(tile), rest = inputs % TILE_INPUTS;
    const int64_t ahead = tile.width * apart; /* the panels that come next */
    TileOperands operands = {.last = last, .stride = stride, .inputs = inputs, .step = tile_inputs(params)};
    LinearTile single = tile;
    single.rows = (int)each;
    memset(total, 0, (size_t)(places / each) * sizeof *total);
    for (int64_t block = 0; block < blocks; block++) {
        for (int p = 0; p < tile.width; p++) {
            const uint8_t *weights = work->call->weights + (panel - work->first_panel + p) * apart;
            operands.b[p] = block_bytes(tile.bits, weights, block * inputs, inputs, ahead, bytes[p]);
            if (tile.channel && rest != 0) {
                memset(last[p], 0, sizeof last[p]);
                memcpy(last[p], weights + (inputs - rest) * SIDE, (size_t)(rest * SIDE));
            }
        }
        for (int64_t row = 0; row < places; row += 2 * SIDE) {
            const int64_t left = places - row < 2 * SIDE ? places - row : 2 * SIDE;
            operands.a = work->activations + (part->from + row) * stride + block * inputs;
            operands.ahead = row == 0 && tile.bits == 8 ? ahead : 0;
            if (left > SIDE)
                sum_tiles(true, tile.width > 1, &operands, sums);
            else
                sum_tiles(false, tile.width > 1, &operands, sums);
            add_sums(tile, work, part->from + row, left, panel, block, sums, total + row / each);
        }
    }
    for (int64_t row = 0; row < places / each; row++) {
        for (int p = 0; p < tile.width; p++)
            product[0][p] = total[row][p];
        finish(single, work, part->row + row, panel, product);
    }
}

/* Multiplies rows of a part, from its first on, by `tile.width` panels. Returns the places that it was. */
INLINE int64_t matrix_rows(const LinearTile tile, const LinearWork *work, const Part *part, int64_t panel)
{
    const int64_t places = matrix_places(work->params, part);
    LinearTile some = tile;
    some.width = tile.width > TILE_PANELS ? TILE_PANELS : tile.width;
    for (int p = 0; places > 0 && p < tile.width; p += some.width)
        multiply_matrix(some, work, part, places, panel + p);
    return places;
}

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
 * In each step `lines` lines of weights that are needed later, from `next` on, are fetched. */
typedef struct {
    const int8_t *a;
    const uint8_t *b[TILE_PANELS], *next;
    const uint8_t (*last)[TILE_INPUTS * SIDE];
    int64_t stride, inputs, step, lines;
} TileOperands;

/* Spreads the fetching of `bytes` of weights from `next` on over runs of sum_tiles, of which this is the one for `row` of
 * `places`: memory is read all the time, instead of as fast as it can be for a while. */
INLINE void fetch_share(TileOperands *operands, const uint8_t *next, int64_t bytes, int64_t row, int64_t places)
{
    const int64_t steps = (operands->inputs + operands->step - 1) / operands->step, all = (bytes + BYTES - 1) / BYTES;
    const int64_t runs = (places + 2 * SIDE - 1) / (2 * SIDE);
    operands->lines = (all + runs * steps - 1) / (runs * steps);
    operands->next = next + row / (2 * SIDE) * steps * operands->lines * BYTES;
}

/* Sums of two tiles of places and of panels, with one scale for all inputs. They become outputs between the tiles of the
 * next sums: vectors wait for tiles otherwise, and tiles for vectors. */
typedef struct {
    int32_t (*sums)[TILE_PANELS][LANES];
    int64_t next, places; /* the place that comes next, of so many */
    const float *scales;  /* of the places */
    const int32_t *ones;  /* sums of their activations */
    F16 scale[TILE_PANELS], added[TILE_PANELS]; /* of the outputs */
    Gate gate;
    float *y; /* of the first place, and its residual or NULL; rows are `width` apart, and `left` of one are left */
    const float *residual;
    int64_t width, left;
} Pending;

static Pending pending_outputs(const LinearTile tile, const LinearWork *work, int64_t from, int64_t row, int64_t places,
                               int64_t panel, int32_t (*sums)[TILE_PANELS][LANES])
{
    const LinearCall *call = work->call;
    const Gate gate = work->params->gate;
    const int64_t width = half_outputs(work->params), first = (gate == GATE_NONE ? panel : panel / 2) * LANES;
    Pending p = {.sums = sums,
                 .places = places,
                 .scales = work->scales + from,
                 .ones = work->sums + from,
                 .gate = gate,
                 .y = call->y + row * width + first,
                 .residual = call->residual == NULL ? NULL : call->residual + row * width + first,
                 .width = width,
                 .left = width - first};
    for (int i = 0; i < tile.width; i++) {
        const float *scales = (const float *)call->scales + (panel - work->first_panel + i) * LANES;
        const int64_t begin = gate == GATE_NONE ? first + i * LANES : first + i * width;
        p.scale[i] = load(scales);
        p.added[i] = bias(work, begin, gate == GATE_NONE ? width : (i + 1) * width);
    }
    return p;
}

/* Outputs of the next row. */
INLINE void put_row(const LinearTile tile, const Gate gate, Pending *p)
{
    const int64_t place = p->next, each = places_of_output(tile), at = place / each * p->width;
    const I16 less = ints(middle_code(tile.bits) * p->ones[place]);
    const F16 scale = floats(p->scales[place]);
    F16 value[TILE_PANELS];
    UNROLL
    for (int i = 0; i < tile.width; i++) {
        I16 sum = sub_ints(load_ints(p->sums[place][i]), less);
        F16 whole = to_floats(sum);
        if (tile.fine) {
            const I16 lower_less = ints(middle_code(tile.bits) * p->ones[place + 1]);
            const I16 lower = sub_ints(load_ints(p->sums[place + 1][i]), lower_less);
            for (int k = 0; k < PARTS; k++)
                whole.part[k] = of_halves(sum.part[k], lower.part[k]);
        }
        value[i] = add(mul(whole, mul(p->scale[i], scale)), p->added[i]);
    }
    if (tile.width > 1 && gate != GATE_NONE)
        value[0] = mul(activate(gate, value[0]), value[1]);
    UNROLL
    for (int i = 0; i < tile.width; i++) {
        if (i > 0 && gate != GATE_NONE)
            break;
        if (p->residual != NULL)
            value[i] = add(value[i], load_some(p->residual + at + i * LANES, p->left - i * LANES));
        store_some(p->y + at + i * LANES, p->left - i * LANES, value[i]);
    }
    p->next += each;
}

INLINE void put_rows(const LinearTile tile, Pending *p)
{
    while (p->next < p->places)
        put_row(tile, p->gate, p);
}

/* Between the tiles of each step `count` rows of `pending`, whose gate is `gate`, become outputs. */
INLINE void sum_tiles(const bool tall, const LinearTile tile, const Gate gate, const TileOperands *o,
                      int32_t (*sums)[TILE_PANELS][LANES], Pending *pending, const int64_t count)
{
    enum { APART = sizeof *sums };
    const bool wide = tile.width > 1;
    const uint8_t *next = o->next;
    Pending p = *pending;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t i = 0; i < o->inputs; i += o->step) {
        const bool whole = i + o->step <= o->inputs;
        for (int64_t line = 0; line < o->lines; line++)
            __builtin_prefetch(next + line * BYTES, 0, 2);
        next += o->lines * BYTES;
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
        for (int64_t r = 0; r < count && p.next < p.places; r++)
            put_row(tile, gate, &p);
    }
    TILE_STORE(0, sums[0][0], APART);
    if (wide)
        TILE_STORE(1, sums[0][1], APART);
    if (tall)
        TILE_STORE(2, sums[SIDE][0], APART);
    if (tall && wide)
        TILE_STORE(3, sums[SIDE][1], APART);
    pending->next = p.next;
}

/* Adds the sums of a block and of `places` places, from `first` on, to the outputs of their rows. */
INLINE void add_sums(const LinearTile tile, const bool own_zeros, const LinearWork *work, int64_t first, int64_t places,
                     int64_t panel, int64_t block, int32_t (*sums)[TILE_PANELS][LANES], F16 (*total)[TILE_PANELS])
{
    const int64_t blocks = row_scales(&work->params->row);
    const int32_t middle = middle_code(tile.bits), *ones = work->sums + first * blocks + block;
    const float *scales = work->scales + first * blocks + block;
    F16 scale[TILE_PANELS];
    I16 zeros[TILE_PANELS];
    UNROLL
    for (int p = 0; p < tile.width; p++)
        EACH_PART {
            const int64_t place = ((panel - work->first_panel + p) * blocks + block) * LANES + i * PART_LANES;
            scale[p].part[i] = scales_at(work, false, place);
            zeros[p].part[i] = zeros_at(work, tile.bits, own_zeros, place);
        }
    for (int64_t row = 0; row < places; row++, ones += blocks, scales += blocks)
        UNROLL
        for (int p = 0; p < tile.width; p++) {
            const I16 sum = load_ints(sums[row][p]);
            EACH_PART {
                const PartI less = own_zeros ? zeros[p].part[i] * *ones : middle * *ones - (PartI){0};
                const PartF whole = __builtin_convertvector(sum.part[i] - less, PartF);
                total[row][p].part[i] = part_fma(whole, scale[p].part[i] * *scales, total[row][p].part[i]);
            }
        }
}

/* Panels with a scale for each block of inputs, whose products are added in order. */
INLINE void multiply_blocks(const LinearTile tile, const LinearWork *work, const Part *part, int64_t places, int64_t panel)
{
    _Alignas(BYTES) int32_t sums[2 * SIDE][TILE_PANELS][LANES];
    _Alignas(BYTES) uint8_t bytes[TILE_PANELS][MOST_WIDENED * SIDE];
    F16 total[MULTIPLIED_ROWS][TILE_PANELS], product[1][MOST_PANELS];
    Pending none = {0};
    const LinearParams *params = work->params;
    const int64_t blocks = row_scales(&params->row), inputs = params->row.block, stride = row_bytes(&params->row);
    const int64_t apart = panel_bytes(params), ahead = tile.width * apart; /* the panels that come next */
    const uint8_t *next = work->call->weights + (panel - work->first_panel) * apart + ahead;
    TileOperands operands = {.stride = stride, .inputs = inputs, .step = tile_inputs(params)};
    LinearTile single = tile;
    single.rows = 1;
    memset(total, 0, (size_t)places * sizeof *total);
    for (int64_t block = 0; block < blocks; block++) {
        for (int p = 0; p < tile.width; p++) {
            const uint8_t *weights = work->call->weights + (panel - work->first_panel + p) * apart;
            operands.b[p] = block_bytes(tile.bits, weights, block * inputs, inputs, ahead, bytes[p]);
        }
        for (int64_t row = 0; row < places; row += 2 * SIDE) {
            const int64_t left = places - row < 2 * SIDE ? places - row : 2 * SIDE;
            operands.a = work->activations + (part->from + row) * stride + block * inputs;
            if (tile.bits == 8)
                fetch_share(&operands, next + block * tile.width * inputs * SIDE, tile.width * inputs * SIDE, row, places);
            if (left > SIDE)
                sum_tiles(true, tile, GATE_NONE, &operands, sums, &none, 0);
            else
                sum_tiles(false, tile, GATE_NONE, &operands, sums, &none, 0);
            if (work->call->zero_points != NULL)
                add_sums(tile, true, work, part->from + row, left, panel, block, sums, total + row);
            else
                add_sums(tile, false, work, part->from + row, left, panel, block, sums, total + row);
        }
    }
    for (int64_t row = 0; row < places; row++) {
        for (int p = 0; p < tile.width; p++)
            product[0][p] = total[row][p];
        finish(single, work, part->row + row, panel, product);
    }
}

/* Panels with one scale for all inputs. */
INLINE void multiply_channels(const LinearTile tile, const LinearWork *work, const Part *part, int64_t places, int64_t panel,
                              int32_t (*sums)[2 * SIDE][TILE_PANELS][LANES], Pending *pending)
{
    _Alignas(BYTES) uint8_t last[TILE_PANELS][TILE_INPUTS * SIDE];
    const LinearParams *params = work->params;
    const int64_t inputs = (params->row.inputs + 3) / 4 * 4, rest = inputs % TILE_INPUTS, apart = panel_bytes(params);
    const int64_t stride = row_bytes(&params->row), each = places_of_output(tile);
    const int64_t steps = (inputs + TILE_INPUTS - 1) / TILE_INPUTS, count = (2 * SIDE / each + steps - 1) / steps;
    TileOperands operands = {.last = last, .stride = stride, .inputs = inputs, .step = TILE_INPUTS};
    for (int p = 0; p < tile.width; p++) {
        operands.b[p] = work->call->weights + (panel - work->first_panel + p) * apart;
        if (rest != 0) {
            memset(last[p], 0, sizeof last[p]);
            memcpy(last[p], operands.b[p] + (inputs - rest) * SIDE, (size_t)(rest * SIDE));
        }
    }
    for (int64_t row = 0; row < places; row += 2 * SIDE) {
        const int64_t left = places - row < 2 * SIDE ? places - row : 2 * SIDE;
        int32_t (*to)[TILE_PANELS][LANES] = sums[pending->sums == sums[0]];
        operands.a = work->activations + (part->from + row) * stride;
        fetch_share(&operands, operands.b[0] + tile.width * apart, tile.width * apart, row, places);
        if (left <= SIDE)
            sum_tiles(false, tile, GATE_NONE, &operands, to, pending, 0);
        else if (tile.width > 1 && params->gate == GATE_SILU)
            sum_tiles(true, tile, GATE_SILU, &operands, to, pending, count);
        else
            sum_tiles(true, tile, GATE_NONE, &operands, to, pending, params->gate == GATE_NONE ? count : 0);
        put_rows(tile, pending);
        *pending = pending_outputs(tile, work, part->from + row, part->row + row / each, left, panel, to);
    }
}

/* Multiplies rows of a part, from its first on, by `tile.width` panels. Returns the places that it was. */
INLINE int64_t matrix_rows(const LinearTile tile, const LinearWork *work, const Part *part, int64_t panel)
{
    _Alignas(BYTES) int32_t sums[2][2 * SIDE][TILE_PANELS][LANES];
    const int64_t places = matrix_places(work->params, part);
    Pending pending = {0};
    LinearTile some = tile;
    some.width = tile.width > TILE_PANELS ? TILE_PANELS : tile.width;
    for (int p = 0; places > 0 && p < tile.width; p += some.width)
        if (tile.channel)
            multiply_channels(some, work, part, places, panel + p, sums, &pending);
        else
            multiply_blocks(some, work, part, places, panel + p);
    put_rows(some, &pending);
    return places;
}

/* Tiles of a linear layer: outputs of a few rows times a few panels. */
#include "vectors.h"

#include "gates.h"
#include "../linear.h"

/* Places of rows that a task multiplies: they fit in the cache of a core. */
#ifdef MATRIX_TILES
enum { MULTIPLIED_ROWS = 256 };
#else
enum { MULTIPLIED_ROWS = 96 };
#endif

/* Rows that are multiplied together. A row of the call is in one place, or in two if its values have 16 bits (`fine`) or
 * are stored in as many: the words, or the upper bytes and then the lower ones. */
typedef struct {
    int64_t from, end; /* places */
    int64_t row;       /* of the call: the first */
    bool fine;
} Part;

typedef struct {
    int64_t place; /* the first */
    bool fine;
} Row;

typedef struct {
    const LinearParams *params;
    const LinearCall *call;
    int8_t *activations; /* as in Rounded */
    float *scales;
    int32_t *sums;
    float *scratch;      /* [row tasks, row_bytes] */
    Row *rows;           /* of the call */
    int64_t first, end;  /* of the rows, those that are to be quantized */
    Part *parts;
    size_t part_count;
    int64_t first_panel; /* that the call's weights and scales begin with */
    const uint8_t *memory; /* of all panels, or what they are packed from: as many bytes */
    int64_t width; /* panels of a task */
    size_t groups; /* tasks that cover the panels */
} LinearWork;

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
    const int rows = outputs_of(tile);
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

/* Numbers of a column of block `block`: scales or zero points, at this place. */
INLINE int64_t column_place(const LinearTile tile, int64_t panel, int64_t blocks, int64_t block, int part, int column)
{
    const int parts = parts_at_once(tile);
    return ((panel + column / parts) * blocks + block) * LANES + (part + column % parts) * PART_LANES;
}

/* 256 * high + low, rounded to float. */
INLINE PartF of_halves(PartI high, PartI low)
{
    const PartF upper = __builtin_convertvector(high + (low >> 8), PartF), lower = __builtin_convertvector(low & 255, PartF);
    return part_fma(upper, 256.f - (PartF){0}, lower);
}

/* The middle of codes, less what is subtracted from them as they are read. */
INLINE int32_t middle_code(const int bits) { return (bits == 4 ? 8 : 128) - read_less(bits); }

/* Zero points at place `at`, less the same; not read without them. */
INLINE PartI zeros_at(const LinearWork *work, const int bits, const bool own_zeros, int64_t at)
{
    return own_zeros ? part_load_unsigned(work->call->zero_points + at) - read_less(bits) : (PartI){0};
}

/* Scales at place `at`; one for each output is a float. */
INLINE PartF scales_at(const LinearWork *work, const bool channel, int64_t at)
{
    PartF scale;
    if (!channel && work->call->half_scales)
        return part_load_halves((const uint16_t *)work->call->scales + at);
    memcpy(&scale, (const float *)work->call->scales + at, sizeof scale);
    return scale;
}

/* Adds a block to outputs of a row whose scales are at place `at`. Weights are unsigned: the zero point times the sum of the
 * activations is subtracted from `sum`, or from `sum` and `lower` of a fine row. Sums of a block are integers, and blocks
 * are added in order, so the result of a row does not depend on the tile. */
INLINE PartF add_block(const LinearTile tile, const LinearWork *work, int64_t at, const bool own_zeros, PartI zeros,
                       PartF scale, PartI sum, PartI lower, PartF total)
{
    const int32_t middle = middle_code(tile.bits), ones = work->sums[at];
    PartF whole;
    if (tile.fine)
        whole = of_halves(sum - middle * ones, lower - middle * work->sums[at + 1]);
    else if (own_zeros)
        whole = __builtin_convertvector(sum - zeros * ones, PartF);
    else
        whole = __builtin_convertvector(sum - middle * ones, PartF);
    const PartF both = scale * work->scales[at];
    return tile.channel ? whole * both : part_fma(whole, both, total);
}

/* Products of a tile's rows and of parts from `part` on of its panels, the products from `first` on. Bytes from `next` on
 * are fetched on the way. */
INLINE void multiply_parts(const LinearTile tile, const LinearWork *work, int64_t row, int64_t panel, int part, int first,
                           const uint8_t *next, F16 (*product)[MOST_PANELS])
{
    const LinearParams *params = work->params;
    const LinearCall *call = work->call;
    const int parts = parts_at_once(tile), columns = parts * tile.width;
    const int64_t blocks = tile.channel ? 1 : row_scales(&params->row), apart = panel_bytes(params);
    const int64_t inputs = tile.channel ? (params->row.inputs + 3) / 4 * 4 : params->row.block;
    const int64_t stride = row_bytes(&params->row), each = places_of_output(tile);
    const int rows = outputs_of(tile);
    const bool own_zeros = !tile.channel && call->zero_points != NULL;
    PartF total[MOST_ROWS][MOST_COLUMNS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < columns; c++)
            total[r][c] = (PartF){0};
    for (int64_t block = 0; block < blocks; block++) {
        PartI sum[MOST_SUMS][MOST_COLUMNS];
        sum_products(tile,
                     (Operands){.a = work->activations + row * stride,
                                .b = call->weights + (panel - work->first_panel) * apart + part * PART_BYTES,
                                .stride = places_of_row(tile) * stride,
                                .apart = apart,
                                .from = block * inputs,
                                .end = (block + 1) * inputs,
                                .next = next},
                     sum);
        UNROLL
        for (int c = 0; c < columns; c++) {
            const int64_t place = column_place(tile, panel - work->first_panel, blocks, block, part, c);
            const PartF scale = scales_at(work, tile.channel, place);
            const PartI zeros = zeros_at(work, tile.bits, own_zeros, place);
            UNROLL
            for (int r = 0; r < rows; r++) {
                const int64_t at = (row + each * r) * blocks + block;
                const PartI first_sum = tile.fine ? sum[2 * r][c] : sum[r][c], lower = tile.fine ? sum[2 * r + 1][c] : first_sum;
                total[r][c] = add_block(tile, work, at, own_zeros, zeros, scale, first_sum, lower, total[r][c]);
            }
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < columns; c++)
            product[r][first + c / parts].part[part + c % parts] = total[r][c];
}

/* The first tile of a part fetches the panels that come next, evenly over all its steps. */
INLINE void linear_tile(const LinearTile tile, const LinearWork *work, const Part *part, int64_t row, int64_t out, int64_t panel)
{
    F16 product[MOST_ROWS][MOST_PANELS];
    const int64_t bytes = panel_bytes(work->params);
    const uint8_t *next = row == part->from ? work->memory + (panel + tile.width) * bytes : NULL;
    LinearTile some = tile; /* as many panels as there are columns at once */
    if (most_columns(tile) < tile.width)
        some.width = most_columns(tile);
    const int parts = parts_at_once(some);
    for (int p = 0; p < tile.width; p += some.width)
        for (int first = 0; first < PARTS; first += parts) {
            multiply_parts(some, work, row, panel + p, first, p, next, product);
            next = next == NULL ? NULL : next + some.width * parts * bytes / PARTS;
        }
    finish(tile, work, out, panel, product);
}

#ifdef MATRIX_TILES
#include "linear_matrix.c"
#endif

/* The rows of a part times `width` panels, in tiles of a few sizes. */
INLINE void strip(const int width, const int bits, const bool channel, const bool fine, const LinearWork *work,
                  const Part *part, int64_t panel)
{
    const LinearTile tile = {channel || !WORDS ? TILE_ROWS : FEWER_ROWS, width, bits, channel, fine};
    LinearTile middle = tile, small = tile, smallest = tile;
    const int each = places_of_output(tile), step = places_of_row(tile);
    int64_t row = part->from, out = part->row;
#ifdef MATRIX_TILES
    const int64_t done = matrix_rows(tile, work, part, panel);
    row += done;
    out += done / each;
#endif
    middle.rows = FEWER_ROWS;
    small.rows = fine && !WORDS ? 2 : SMALL_ROWS;
    smallest.rows = each / step;
    for (; row + tile.rows * step <= part->end; row += tile.rows * step, out += outputs_of(tile))
        linear_tile(tile, work, part, row, out, panel);
    if (FEWER_ROWS < tile.rows)
        for (; row + middle.rows * step <= part->end; row += middle.rows * step, out += outputs_of(middle))
            linear_tile(middle, work, part, row, out, panel);
    for (; row + small.rows * step <= part->end; row += small.rows * step, out += outputs_of(small))
        linear_tile(small, work, part, row, out, panel);
    for (; row < part->end; row += each, out++)
        linear_tile(smallest, work, part, row, out, panel);
}

typedef void Strip(const LinearWork *work, const Part *part, int64_t panel);

#define STRIP(name, width, bits, channel, fine)                              \
    static void name(const LinearWork *work, const Part *part, int64_t panel) \
    {                                                                         \
        strip(width, bits, channel, fine, work, part, panel);                \
    }
STRIP(channel_2, 2, 8, true, false)
STRIP(channel_1, 1, 8, true, false)
STRIP(fine_2, 2, 8, true, true)
STRIP(fine_1, 1, 8, true, true)
STRIP(eight_2, 2, 8, false, false)
STRIP(eight_1, 1, 8, false, false)
STRIP(four_2, 2, 4, false, false)
STRIP(four_1, 1, 4, false, false)

/* For each quantization: strips of 4 panels (NULL if the sums do not fit in registers), 2 and 1. */
#ifdef WIDE_STRIPS
STRIP(channel_4, 4, 8, true, false)
STRIP(fine_4, 4, 8, true, true)
#else
#define channel_4 NULL
#define fine_4 NULL
#endif
static Strip *const CHANNEL[] = {channel_4, channel_2, channel_1}, *const FINE[] = {fine_4, fine_2, fine_1};
static Strip *const EIGHT[] = {NULL, eight_2, eight_1}, *const FOUR[] = {NULL, four_2, four_1};

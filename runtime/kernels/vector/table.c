#include "vectors.h"

#include <string.h>

#include "../rows.h"
#include "../scratch.h"
#include "../table.h"

enum {
    TABLE_ROWS = 256,                /* rows of the table that a task takes */
    TABLE_TILE = PARTS == 1 ? 4 : 2, /* rows of the table, and of activations, that share what they load */
};

typedef struct {
    const TableParams *params;
    const TableCall *call;
    const int8_t *rounded;  /* [rows, row_bytes] */
    const float *steps;     /* [rows, vectors, 16]: the scale of each lane's block */
    const int32_t *offsets; /* the same: what the zero points add and products do not subtract, taken off */
} TableWork;

/* Scales of blocks, in the lanes of the 4 inputs each that are of them. Lanes after `last` blocks have any. */
INLINE F16 scales_of_lanes(const bool whole, const float *scales, int64_t block, int64_t last)
{
    const F16 first = floats(scales[0]);
    if (block >= BYTES || (!whole && last == 0))
        return first;
    const F16 second = floats(scales[1]);
    if (block == BYTES / 2)
        return choose(lanes_below(LANES / 2), first, second);
    const F16 third = floats(scales[whole || last > 2 ? 2 : last]), fourth = floats(scales[whole ? 3 : last]);
    const F16 low = choose(lanes_below(4), first, second), high = choose(lanes_below(12), third, fourth);
    return choose(lanes_below(LANES / 2), low, high);
}

/* Adds the products of `left` inputs, BYTES if `whole`, from input `first` on. Lanes hold 4 inputs each, all of one block. */
INLINE void add_table_products(const int rows, const int outputs, const bool whole, const TableWork *work, int64_t row,
                               int64_t output, int64_t first, int64_t left, F16 (*sum)[TABLE_TILE])
{
    const int64_t inputs = work->params->row.inputs, block = work->params->row.block, blocks = inputs / block;
    const int64_t stride = row_bytes(&work->params->row), at = row * stride + first;
    const uint8_t *weights = (const uint8_t *)work->call->weights + output * inputs + first;
    const float *scales = work->call->scales + output * blocks + first / block;
    F16 scale[TABLE_TILE];
    uint8_t some[TABLE_TILE][BYTES] = {0};
    UNROLL
    for (int o = 0; o < outputs; o++) {
        if (outputs > 1 && whole) /* what comes next: processors do not fetch ahead across pages by themselves */
            __builtin_prefetch(weights + (o + 2 * outputs) * inputs, 0, 2);
        for (int64_t part = 0; !whole && part < left; part += LANES)
            memcpy(some[o] + part, weights + o * inputs + part, LANES);
        scale[o] = scales_of_lanes(whole, scales + o * blocks, block, left / block - 1);
    }
    EACH_PART {
        Weights w[TABLE_TILE];
        UNROLL
        for (int o = 0; o < outputs; o++)
            w[o] = weights_of_8_bits((whole ? weights + o * inputs : some[o]) + i * PART_BYTES);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const int64_t place = at + r * stride + i * PART_BYTES;
            PartI x, offset = {0};
            PartF step;
            memcpy(&x, work->rounded + place, sizeof x);
            memcpy(&step, work->steps + place / 4, sizeof step);
            if (LESS != 128)
                memcpy(&offset, work->offsets + place / 4, sizeof offset);
            UNROLL
            for (int o = 0; o < outputs; o++) {
                const PartF products = __builtin_convertvector(add_dot(offset, w[o], x), PartF);
                sum[r][o].part[i] = part_fma(products, scale[o].part[i] * step, sum[r][o].part[i]);
            }
        }
    }
}

/* Some rows of the table times some rows of activations. Each pair has sums of its own, so the result of a row does not
 * depend on the tile. */
INLINE void table_tile(const int rows, const int outputs, const TableWork *work, int64_t row, int64_t output)
{
    const int64_t inputs = work->params->row.inputs;
    F16 sum[TABLE_TILE][TABLE_TILE];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < outputs; o++)
            sum[r][o] = floats(0);
    int64_t first = 0;
    for (; first + BYTES <= inputs; first += BYTES)
        add_table_products(rows, outputs, true, work, row, output, first, BYTES, sum);
    if (first < inputs)
        add_table_products(rows, outputs, false, work, row, output, first, inputs - first, sum);
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < outputs; o++)
            work->call->y[(row + r) * work->params->outputs + output + o] = sum_of(sum[r][o]);
}

static void multiply_table(void *data, size_t index)
{
    const TableWork *work = data;
    const int64_t outputs = work->params->outputs, first = (int64_t)index * TABLE_ROWS;
    const int64_t end = first + TABLE_ROWS < outputs ? first + TABLE_ROWS : outputs;
    int64_t o = first;
    for (; work->call->rows >= TABLE_TILE && o + TABLE_TILE <= end; o += TABLE_TILE) {
        int64_t r = 0;
        for (; r + TABLE_TILE <= work->call->rows; r += TABLE_TILE)
            table_tile(TABLE_TILE, TABLE_TILE, work, r, o);
        for (; r < work->call->rows; r++)
            table_tile(1, TABLE_TILE, work, r, o);
    }
    for (; o < end; o++)
        for (int64_t r = 0; r < work->call->rows; r++)
            table_tile(1, 1, work, r, o);
}

/* Copies each block's scale, and the contribution of its zero points, to the lanes of its inputs. */
static void spread(const RowParams *params, const int8_t *weights, const float *scales, float *steps, int32_t *offsets)
{
    for (int64_t i = 0; i < row_bytes(params) / 4; i++) {
        const bool there = 4 * i < params->inputs;
        steps[i] = there ? scales[4 * i / params->block] : 0;
        const int32_t sum = weights[4 * i] + weights[4 * i + 1] + weights[4 * i + 2] + weights[4 * i + 3];
        offsets[i] = there ? (LESS - 128) * sum : 0;
    }
}

static const char *table_run(const TableParams *params, const TableCall *call, const Parallel *parallel)
{
    const int64_t inputs = params->row.inputs, rows = call->rows, stride = row_bytes(&params->row);
    if (rows == 0)
        return NULL;
    if (params->row.block == 0) {
        half_table_run(params, call, parallel);
        return NULL;
    }
    const int64_t blocks = inputs / params->row.block;
    /* quantized values, scales and offsets of each row; then scratch, scales and sums of one row */
    const size_t each = (size_t)stride, quantized_bytes = (size_t)rows * each, lane_bytes = quantized_bytes;
    uint8_t *memory = thread_scratch(OF_RUN, quantized_bytes + 2 * lane_bytes + each * 4 + (size_t)blocks * 8);
    if (memory == NULL)
        return "satchel:TableLinear: out of memory";
    int8_t *rounded = (int8_t *)memory;
    float *steps = (float *)(memory + quantized_bytes), *scratch = (float *)(memory + quantized_bytes + 2 * lane_bytes);
    int32_t *offsets = (int32_t *)(memory + quantized_bytes + lane_bytes);
    float *row_scale = scratch + stride;
    for (int64_t r = 0; r < rows; r++) {
        quantize_row((Form){false, false}, &params->row, call->x + r * inputs, NULL, scratch, rounded + r * stride, row_scale,
                     (int32_t *)(row_scale + blocks));
        spread(&params->row, rounded + r * stride, row_scale, steps + r * stride / 4, offsets + r * stride / 4);
    }
    TableWork work = {params, call, rounded, steps, offsets};
    parallel_for(parallel, (size_t)((params->outputs + TABLE_ROWS - 1) / TABLE_ROWS), multiply_table, &work);
    return NULL;
}

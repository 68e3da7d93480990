/* Linear layers over an embedding table, which lies in memory once, as lookups read it. For many rows, a few outputs at a
 * time are packed as panels of a linear layer, in the first cache, and multiplied by its tiles. Both ways give the same bits:
 * sums of a block are integers, and blocks are added in order. */
#include "vectors.h"

#include <stdbool.h>
#include <string.h>

#include "../linear.h"
#include "../rows.h"
#include "../scratch.h"
#include "../table.h"

enum {
    TASK_PANELS = 16,
    PACKED_PANELS = 2, /* that are multiplied together */
    PACKED_ROWS = 8,   /* so many rows are worth packing */
};

typedef struct {
    LinearWork linear;
    const TableCall *call;
    bool out_of_memory;
} TableWork;

/* Rows of 4 numbers to columns. */
INLINE void transpose_fours(Four *rows)
{
    const Four low_01 = FOUR_OF(rows[0], rows[1], 0, 4, 1, 5), high_01 = FOUR_OF(rows[0], rows[1], 2, 6, 3, 7);
    const Four low_23 = FOUR_OF(rows[2], rows[3], 0, 4, 1, 5), high_23 = FOUR_OF(rows[2], rows[3], 2, 6, 3, 7);
    rows[0] = FOUR_OF(low_01, low_23, 0, 1, 4, 5);
    rows[1] = FOUR_OF(low_01, low_23, 2, 3, 6, 7);
    rows[2] = FOUR_OF(high_01, high_23, 0, 1, 4, 5);
    rows[3] = FOUR_OF(high_01, high_23, 2, 3, 6, 7);
}

INLINE Four load_four(const void *x)
{
    Four v;
    memcpy(&v, x, sizeof v);
    return v;
}

/* Packs 16 inputs of 4 outputs, whose rows are `stride` bytes apart. */
INLINE void pack_some(const uint8_t *table, int64_t stride, uint8_t *panel)
{
    Four v[] = {load_four(table), load_four(table + stride), load_four(table + 2 * stride), load_four(table + 3 * stride)};
    transpose_fours(v);
    UNROLL
    for (int i = 0; i < 4; i++)
        memcpy(panel + i * BYTES, &v[i], sizeof v[i]);
}

/* Packs scales of 16 outputs from `first` on, as [blocks, 16]. Those after the last are zero. */
static void pack_scales(const TableWork *work, int64_t first, float *scales)
{
    const int64_t blocks = row_scales(&work->linear.params->row), left = work->linear.params->outputs - first;
    const float *from = work->call->scales + first * blocks;
    if (left < LANES)
        memset(scales, 0, (size_t)blocks * LANES * sizeof *scales);
    for (int64_t o = 0; o < LANES && o < left; o++)
        for (int64_t b = 0; b < blocks; b++)
            scales[b * LANES + o] = from[o * blocks + b];
}

/* Packs a panel of outputs from `first` on. Those after the last are zero. */
static void pack_panel(const TableWork *work, int64_t first, uint8_t *panel)
{
    const LinearParams *params = work->linear.params;
    const int64_t inputs = params->row.inputs, left = params->outputs - first;
    const uint8_t *table = (const uint8_t *)work->call->weights + first * inputs;
    const bool whole = left >= LANES;
    if (!whole)
        memset(panel, 0, (size_t)panel_bytes(params));
    for (int64_t i = 0; whole && i < inputs; i += LANES)
        UNROLL
        for (int o = 0; o < LANES; o += 4)
            pack_some(table + o * inputs + i, inputs, panel + i * LANES + o * 4);
    for (int64_t o = 0; !whole && o < left; o++)
        for (int64_t i = 0; i < inputs; i += 4)
            memcpy(panel + i * LANES + o * 4, table + o * inputs + i, 4);
}

/* Sums of a block of inputs of 16 outputs, `stride` bytes apart, for one row or two. */
INLINE void block_sums(const int rows, const uint8_t *table, int64_t stride, const int8_t *values, int64_t row_stride,
                       int64_t block, I16 *sums)
{
    int32_t found[2][LANES];
    UNROLL
    for (int group = 0; group < LANES; group += 4) {
        Four some[2][4];
        UNROLL
        for (int o = 0; o < 4; o++) {
            PartI sum[2] = {{0}, {0}};
            for (int64_t i = 0; i < block; i += PART_BYTES) {
                const Run weights = load_run(table + (group + o) * stride + i);
                UNROLL
                for (int r = 0; r < rows; r++)
                    sum[r] = add_run(sum[r], weights, values + r * row_stride + i * PLACES_OF_8_BITS);
            }
            UNROLL
            for (int r = 0; r < rows; r++)
                some[r][o] = part_sum_fours(sum[r]);
        }
        UNROLL
        for (int r = 0; r < rows; r++) {
            transpose_fours(some[r]);
            const Four four = (some[r][0] + some[r][1]) + (some[r][2] + some[r][3]);
            memcpy(found[r] + group, &four, sizeof four);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        sums[r] = load_ints(found[r]);
}

/* 16 outputs of one row or two, the first of which is `row`. */
INLINE void multiply_few_rows(const int rows, const TableWork *work, int64_t row, int64_t first, const float *scales)
{
    const LinearWork *linear = &work->linear;
    const RowParams *params = &linear->params->row;
    const int64_t inputs = params->inputs, block = params->block, blocks = row_scales(params), place = row * PLACES_OF_8_BITS;
    const int64_t row_stride = PLACES_OF_8_BITS * row_bytes(params);
    const uint8_t *table = (const uint8_t *)work->call->weights + first * inputs;
    F16 total[2] = {floats(0), floats(0)};
    for (int64_t b = 0; b < blocks; b++) {
        I16 sums[2];
        for (int64_t i = 0; row == 0 && i < block; i += BYTES / LANES) /* what comes next */
            __builtin_prefetch(table + (inputs + b * block + i) * LANES, 0, 2);
        block_sums(rows, table + b * block, inputs, linear->activations + row * row_stride + b * block * PLACES_OF_8_BITS,
                   row_stride, block, sums);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const int64_t at = (place + r * PLACES_OF_8_BITS) * blocks + b;
            const F16 whole = to_floats(sub_ints(sums[r], ints(middle_code(8) * linear->sums[at])));
            total[r] = mul_add(whole, mul(load(scales + b * LANES), floats(linear->scales[at])), total[r]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        store(work->call->y + (row + r) * linear->params->outputs + first, total[r]);
}

static void multiply_table(void *data, size_t index)
{
    TableWork *work = data;
    const LinearParams *params = work->linear.params;
    const int64_t bytes = panel_bytes(params), blocks = row_scales(&params->row), whole = params->outputs / LANES;
    const int64_t first = (int64_t)index * TASK_PANELS, last = first + TASK_PANELS;
    const int64_t stop = last < panels(params) ? last : panels(params), each = blocks * LANES;
    const bool few = work->call->rows < PACKED_ROWS && params->row.block % BYTES == 0;
    uint8_t *memory = thread_scratch(OF_TASK, PACKED_PANELS * (size_t)(bytes + each * (int64_t)sizeof(float)));
    if (memory == NULL) {
        work->out_of_memory = true;
        return;
    }
    float *scales = (float *)(memory + PACKED_PANELS * bytes);
    LinearCall call = {.rows = work->call->rows, .weights = memory, .scales = scales, .y = work->call->y};
    LinearWork linear = work->linear;
    linear.call = &call;
    linear.memory = work->call->weights;
    for (int64_t panel = first, count; panel < stop; panel += count) {
        count = few || panel + 1 == stop ? 1 : PACKED_PANELS;
        for (int64_t i = 0; i < count; i++)
            pack_scales(work, (panel + i) * LANES, scales + i * each);
        if (few && panel < whole) {
            int64_t row = 0;
            for (; row + 2 <= call.rows; row += 2)
                multiply_few_rows(2, work, row, panel * LANES, scales);
            if (row < call.rows)
                multiply_few_rows(1, work, row, panel * LANES, scales);
            continue;
        }
        for (int64_t i = 0; i < count; i++)
            pack_panel(work, (panel + i) * LANES, memory + i * bytes);
        linear.first_panel = panel;
        for (size_t i = 0; i < linear.part_count; i++)
            multiply_part(&linear, &linear.parts[i], panel, panel + count);
    }
}

static const char *table_run(const TableParams *table, const TableCall *call, const Parallel *parallel)
{
    if (table->row.block == 0) {
        half_table_run(table, call, parallel);
        return NULL;
    }
    const LinearParams params = {.row = table->row, .outputs = table->outputs, .bits = 8};
    const LinearCall rows = {.rows = call->rows, .x = call->x};
    TableWork work = {.call = call};
    if (call->rows == 0)
        return NULL;
    if (!quantize_call(&params, &rows, parallel, &work.linear))
        return "satchel:TableLinear: out of memory";
    parallel_for(parallel, (size_t)((panels(&params) + TASK_PANELS - 1) / TASK_PANELS), multiply_table, &work);
    return work.out_of_memory ? "satchel:TableLinear: out of memory" : NULL;
}

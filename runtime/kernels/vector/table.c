#include "vectors.h"

#include "../scratch.h"
#include "../table.h"
#include "../rows.h"

enum {
    TABLE_ROWS = 256, /* rows of the table that a task takes */
    TABLE_TILE = 4,   /* rows of the table, and of activations, that share what they load */
};

typedef struct {
    const TableParams *params;
    const TableCall *call;
    const int8_t *rounded;  /* [rows, row_bytes] */
    const float *steps;     /* [rows, vectors, 16]: the scale of each lane's block */
    const int32_t *offsets; /* the same: what the zero points add, taken off */
} TableWork;

/* Some rows of the table times some rows of activations. Lanes hold 4 inputs each, all of one block. Each pair has sums of
 * its own, so the result of a row does not depend on the tile. */
INLINE void table_tile(const int rows, const int outputs, const TableWork *work, int64_t row, int64_t output)
{
    const int64_t inputs = work->params->row.inputs, block = work->params->row.block, blocks = inputs / block;
    const int64_t vectors = row_bytes(&work->params->row) / BYTES, stride = vectors * BYTES;
    const uint8_t *weights = work->call->weights + output * inputs;
    const float *scales = work->call->scales + output * blocks, *steps = work->steps + row * stride / 4;
    const int8_t *rounded = work->rounded + row * stride;
    const int32_t *offsets = work->offsets + row * stride / 4;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i place = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(block >= BYTES ? 4 : block == 32 ? 3 : 2));
    __m512 sum[TABLE_TILE][TABLE_TILE];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < outputs; o++)
            sum[r][o] = _mm512_setzero_ps();
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t first = v * BYTES / block;
        __m512i w[TABLE_TILE];
        __m512 scale[TABLE_TILE];
        UNROLL
        for (int o = 0; o < outputs; o++) {
            const float *at = scales + o * blocks + first;
            if (outputs > 1) /* what comes next: processors do not fetch ahead across pages by themselves */
                __builtin_prefetch(weights + (o + 2 * outputs) * inputs + v * BYTES, 0, 2);
            w[o] = _mm512_maskz_loadu_epi8(bytes(inputs - v * BYTES), weights + o * inputs + v * BYTES);
            scale[o] = block >= BYTES ? _mm512_set1_ps(*at)
                                      : _mm512_permutexvar_ps(place, _mm512_maskz_loadu_ps(lanes(blocks - first), at));
        }
        UNROLL
        for (int r = 0; r < rows; r++) {
            const int64_t at = r * stride + v * BYTES;
            const __m512i x = _mm512_load_si512(rounded + at), offset = _mm512_load_si512(offsets + at / 4);
            const __m512 step = _mm512_load_ps(steps + at / 4);
            UNROLL
            for (int o = 0; o < outputs; o++) {
                __m512 whole = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(offset, w[o], x));
                sum[r][o] = _mm512_fmadd_ps(whole, _mm512_mul_ps(scale[o], step), sum[r][o]);
            }
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < outputs; o++)
            work->call->y[(row + r) * work->params->outputs + output + o] = _mm512_reduce_add_ps(sum[r][o]);
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
        offsets[i] = there ? -128 * (weights[4 * i] + weights[4 * i + 1] + weights[4 * i + 2] + weights[4 * i + 3]) : 0;
    }
}

static const char *table_run(const TableParams *params, const TableCall *call, const Parallel *parallel)
{
    const int64_t inputs = params->row.inputs, blocks = inputs / params->row.block, rows = call->rows;
    const int64_t stride = row_bytes(&params->row);
    if (rows == 0)
        return NULL;
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
        quantize_row(&params->row, call->x + r * inputs, NULL, scratch, rounded + r * stride, row_scale,
                     (int32_t *)(row_scale + blocks));
        spread(&params->row, rounded + r * stride, row_scale, steps + r * stride / 4, offsets + r * stride / 4);
    }
    TableWork work = {params, call, rounded, steps, offsets};
    parallel_for(parallel, (size_t)((params->outputs + TABLE_ROWS - 1) / TABLE_ROWS), multiply_table, &work);
    return NULL;
}

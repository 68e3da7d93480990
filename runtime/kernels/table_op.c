/* satchel:TableLinear: a linear layer over an embedding table (tied head): 8-bit blocks, zero point 128. */
#include "vectors.h"

#include <stdlib.h>

#include "operator.h"
#include "rows.h"
#include "scratch.h"

enum {
    TABLE_ROWS = 256, /* rows of the table that a task takes */
    TILE = 4,         /* rows of the table, and of activations, that share what they load */
};

typedef struct {
    RowParams row;
    int64_t outputs;
} TableParams;

typedef struct {
    const TableParams *params;
    int64_t rows;
    const uint8_t *weights; /* [outputs, inputs] */
    const float *scales;    /* [outputs, blocks] */
    float *y;               /* [rows, outputs] */
    const int8_t *rounded;  /* [rows, row_bytes] */
    const float *steps;     /* [rows, vectors, 16]: the scale of each lane's block */
    const int32_t *offsets; /* the same: what the zero points add, taken off */
} TableWork;

static void *create(Create *create)
{
    TableParams *params = calloc(1, sizeof *params);
    if (params == NULL) {
        create->error = "satchel:TableLinear: out of memory";
        return NULL;
    }
    params->row.inputs = attribute(create, "inputs", 0);
    params->row.block = attribute(create, "block", 0);
    params->outputs = attribute(create, "outputs", 0);
    const int64_t k = params->row.inputs, block = params->row.block;
    if (k >= 1 && k <= 1 << 24 && params->outputs >= 1 && params->outputs <= 1 << 24 && block >= 16
        && (block & (block - 1)) == 0 && k % block == 0)
        return params;
    free(params);
    create->error = "satchel:TableLinear: invalid combination of attributes";
    return NULL;
}

/* Some rows of the table times some rows of activations. Lanes hold 4 inputs each, all of one block. Each pair has sums of
 * its own, so the result of a row does not depend on the tile. */
INLINE void tile(const int rows, const int outputs, const TableWork *work, int64_t row, int64_t output)
{
    const int64_t inputs = work->params->row.inputs, block = work->params->row.block, blocks = inputs / block;
    const int64_t vectors = row_bytes(&work->params->row) / BYTES, stride = vectors * BYTES;
    const uint8_t *weights = work->weights + output * inputs;
    const float *scales = work->scales + output * blocks, *steps = work->steps + row * stride / 4;
    const int8_t *rounded = work->rounded + row * stride;
    const int32_t *offsets = work->offsets + row * stride / 4;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i place = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(block >= BYTES ? 4 : block == 32 ? 3 : 2));
    __m512 sum[TILE][TILE];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < outputs; o++)
            sum[r][o] = _mm512_setzero_ps();
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t first = v * BYTES / block;
        __m512i w[TILE];
        __m512 scale[TILE];
        UNROLL
        for (int o = 0; o < outputs; o++) {
            const float *at = scales + o * blocks + first;
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
            work->y[(row + r) * work->params->outputs + output + o] = _mm512_reduce_add_ps(sum[r][o]);
}

static void multiply(void *data, size_t index)
{
    const TableWork *work = data;
    const int64_t outputs = work->params->outputs, first = (int64_t)index * TABLE_ROWS;
    const int64_t end = first + TABLE_ROWS < outputs ? first + TABLE_ROWS : outputs;
    int64_t o = first;
    for (; work->rows >= TILE && o + TILE <= end; o += TILE) {
        int64_t r = 0;
        for (; r + TILE <= work->rows; r += TILE)
            tile(TILE, TILE, work, r, o);
        for (; r < work->rows; r++)
            tile(1, TILE, work, r, o);
    }
    for (; o < end; o++)
        for (int64_t r = 0; r < work->rows; r++)
            tile(1, 1, work, r, o);
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

static bool run(const void *kernel, Run *run)
{
    const TableParams *params = kernel;
    const int64_t inputs = params->row.inputs, block = params->row.block, blocks = inputs / block;
    const int64_t whole[] = {params->outputs, blocks, block}, stride = row_bytes(&params->row);
    Tensor x, weights, scales;
    if (!input(run, 0, ORT_FLOAT, &x) || !input(run, 1, ORT_UINT8, &weights) || !input(run, 2, ORT_FLOAT, &scales))
        return false;
    if (x.rank == 0 || x.dims[x.rank - 1] != inputs)
        return fail(run, "satchel:TableLinear: the input width differs from attribute inputs");
    if (!has_dims(&weights, 3, whole) || !has_dims(&scales, 2, whole))
        return fail(run, "satchel:TableLinear: the table does not have the shape of the attributes");
    const int64_t rows = x.count / inputs;
    TableWork work = {params, rows, weights.data, scales.data, NULL, NULL, NULL, NULL};
    x.dims[x.rank - 1] = params->outputs;
    if (!output(run, 0, x.dims, x.rank, &work.y))
        return false;
    if (rows == 0)
        return true;
    /* quantized values, scales and offsets of each row; then scratch, scales and sums of one row */
    const size_t each = (size_t)stride, quantized_bytes = (size_t)rows * each, lane_bytes = quantized_bytes;
    uint8_t *memory = thread_scratch(OF_RUN, quantized_bytes + 2 * lane_bytes + each * 4 + (size_t)blocks * 8);
    if (memory == NULL)
        return fail(run, "satchel:TableLinear: out of memory");
    int8_t *rounded = (int8_t *)memory;
    float *steps = (float *)(memory + quantized_bytes), *scratch = (float *)(memory + quantized_bytes + 2 * lane_bytes);
    int32_t *offsets = (int32_t *)(memory + quantized_bytes + lane_bytes);
    float *row_scale = scratch + stride;
    for (int64_t r = 0; r < rows; r++) {
        quantize_row(&params->row, (const float *)x.data + r * inputs, NULL, scratch, rounded + r * stride, row_scale,
                     (int32_t *)(row_scale + blocks));
        spread(&params->row, rounded + r * stride, row_scale, steps + r * stride / 4, offsets + r * stride / 4);
    }
    work.rounded = rounded, work.steps = steps, work.offsets = offsets;
    parallel_for(&run->contiguous, (size_t)((params->outputs + TABLE_ROWS - 1) / TABLE_ROWS), multiply, &work);
    return true;
}

static const OrtElementType INPUTS[] = {ORT_FLOAT, ORT_UINT8, ORT_FLOAT};

Operator table_linear_operator = {.name = "TableLinear",
                                  .inputs = 3,
                                  .required = 3,
                                  .outputs = 1,
                                  .input_types = INPUTS,
                                  .create = create,
                                  .run = run};

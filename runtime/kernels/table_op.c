/* satchel:TableLinear: the product with a table of rows, which look-ups read too: 8 bits in blocks, zero point 128. */
#include "vectors.h"

#include <stdlib.h>

#include "operator.h"
#include "rows.h"

enum { TABLE_ROWS = 256 }; /* rows of the table that a task takes */

typedef struct {
    RowForm form;
    int64_t outputs;
} TableForm;

typedef struct {
    const TableForm *form;
    int64_t rows;
    const uint8_t *codes;   /* [outputs, inputs] */
    const float *scales;    /* [outputs, blocks] */
    float *y;               /* [rows, outputs] */
    const int8_t *rounded;  /* [rows, code_bytes] */
    const float *steps;     /* [rows, vectors, 16]: the scale of each lane's block */
    const int32_t *offsets; /* the same: what the zero points add, taken off */
} TableWork;

static void *create(Create *create)
{
    TableForm *form = calloc(1, sizeof *form);
    if (form == NULL) {
        create->error = "satchel:TableLinear: out of memory";
        return NULL;
    }
    form->form.inputs = attribute(create, "inputs", 0);
    form->form.block = attribute(create, "block", 0);
    form->outputs = attribute(create, "outputs", 0);
    const int64_t k = form->form.inputs, block = form->form.block;
    if (k >= 1 && k <= 1 << 24 && form->outputs >= 1 && form->outputs <= 1 << 24 && block >= 16 && (block & (block - 1)) == 0
        && k % block == 0)
        return form;
    free(form);
    create->error = "satchel:TableLinear: its attributes do not go together";
    return NULL;
}

/* One row of the table times one row of activations. Lanes hold 4 inputs each, all of one block. */
INLINE float dot(const TableWork *work, int64_t row, int64_t output)
{
    const int64_t inputs = work->form->form.inputs, block = work->form->form.block, blocks = inputs / block;
    const int64_t vectors = code_bytes(&work->form->form) / BYTES;
    const uint8_t *codes = work->codes + output * inputs;
    const float *scales = work->scales + output * blocks, *steps = work->steps + row * vectors * LANES;
    const int8_t *rounded = work->rounded + row * vectors * BYTES;
    const int32_t *offsets = work->offsets + row * vectors * LANES;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i place = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(block >= BYTES ? 4 : block == 32 ? 3 : 2));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t first = v * BYTES / block;
        __m512i w = _mm512_maskz_loadu_epi8(bytes(inputs - v * BYTES), codes + v * BYTES);
        __m512i whole = _mm512_dpbusd_epi32(_mm512_load_si512(offsets + v * LANES), w, _mm512_load_si512(rounded + v * BYTES));
        __m512 scale = block >= BYTES ? _mm512_set1_ps(scales[first])
                                      : _mm512_permutexvar_ps(place, _mm512_maskz_loadu_ps(lanes(blocks - first), scales + first));
        scale = _mm512_mul_ps(scale, _mm512_load_ps(steps + v * LANES));
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

static void multiply(void *data, size_t index)
{
    const TableWork *work = data;
    const int64_t outputs = work->form->outputs, first = (int64_t)index * TABLE_ROWS;
    const int64_t end = first + TABLE_ROWS < outputs ? first + TABLE_ROWS : outputs;
    for (int64_t o = first; o < end; o++)
        for (int64_t r = 0; r < work->rows; r++)
            work->y[r * outputs + o] = dot(work, r, o);
}

/* Spread each block's scale, and its zero points' share, over the lanes that its inputs are in. */
static void spread(const RowForm *form, const int8_t *codes, const float *scales, float *steps, int32_t *offsets)
{
    for (int64_t i = 0; i < code_bytes(form) / 4; i++) {
        const bool there = 4 * i < form->inputs;
        steps[i] = there ? scales[4 * i / form->block] : 0;
        offsets[i] = there ? -128 * (codes[4 * i] + codes[4 * i + 1] + codes[4 * i + 2] + codes[4 * i + 3]) : 0;
    }
}

static bool run(const void *kernel, Run *run)
{
    const TableForm *form = kernel;
    const int64_t inputs = form->form.inputs, block = form->form.block, blocks = inputs / block;
    const int64_t whole[] = {form->outputs, blocks, block}, stride = code_bytes(&form->form);
    Tensor x, codes, scales;
    if (!input(run, 0, ORT_FLOAT, &x) || !input(run, 1, ORT_UINT8, &codes) || !input(run, 2, ORT_FLOAT, &scales))
        return false;
    if (x.rank == 0 || x.dims[x.rank - 1] != inputs)
        return fail(run, "satchel:TableLinear: its input does not have the width that the node says");
    if (!has_dims(&codes, 3, whole) || !has_dims(&scales, 2, whole))
        return fail(run, "satchel:TableLinear: the table does not have the shape that the node says");
    const int64_t rows = x.count / inputs;
    TableWork work = {form, rows, codes.data, scales.data, NULL, NULL, NULL, NULL};
    x.dims[x.rank - 1] = form->outputs;
    if (!output(run, 0, x.dims, x.rank, &work.y))
        return false;
    if (rows == 0)
        return true;
    /* codes, steps and offsets of each row; then the room, scales and sums of one */
    const size_t each = (size_t)stride, codes_bytes = (size_t)rows * each, lane_bytes = codes_bytes;
    uint8_t *memory = scratch(codes_bytes + 2 * lane_bytes + each * 4 + (size_t)blocks * 8);
    if (memory == NULL)
        return fail(run, "satchel:TableLinear: out of memory");
    int8_t *rounded = (int8_t *)memory;
    float *steps = (float *)(memory + codes_bytes), *room = (float *)(memory + codes_bytes + 2 * lane_bytes);
    int32_t *offsets = (int32_t *)(memory + codes_bytes + lane_bytes);
    float *row_scale = room + stride;
    for (int64_t r = 0; r < rows; r++) {
        round_row(&form->form, (const float *)x.data + r * inputs, NULL, room, rounded + r * stride, row_scale,
                  (int32_t *)(row_scale + blocks));
        spread(&form->form, rounded + r * stride, row_scale, steps + r * stride / 4, offsets + r * stride / 4);
    }
    work.rounded = rounded, work.steps = steps, work.offsets = offsets;
    parallel_for(&run->contiguous, (size_t)((form->outputs + TABLE_ROWS - 1) / TABLE_ROWS), multiply, &work);
    return true;
}

static const OrtElementType INPUTS[] = {ORT_FLOAT, ORT_UINT8, ORT_FLOAT};

Operator table_linear_operator = {
    .name = "TableLinear", .inputs = 3, .required = 3, .outputs = 1, .input_types = INPUTS, .create = create, .run = run};

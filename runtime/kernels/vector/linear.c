/* Linear layers: quantizes the rows of a call, and multiplies them in tiles. */
#include "vectors.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "../rows.h"
#include "../linear.h"
#include "../scratch.h"

enum { QUANTIZED_ROWS = 8 }; /* rows of a task that quantizes activations */

/* Rows of a part times panels up to `stop`. */
static void multiply_part(const LinearWork *work, const Part *part, int64_t panel, int64_t stop)
{
    const LinearParams *params = work->params;
#ifdef MATRIX_TILES
    const bool tiles = configure_tiles(params, part);
#endif
    Strip *const *strips = part->fine ? FINE : params->row.block == 0 ? CHANNEL : params->bits == 8 ? EIGHT : FOUR;
    for (; strips[0] != NULL && panel + 4 <= stop; panel += 4)
        strips[0](work, part, panel);
    for (; panel + 2 <= stop; panel += 2)
        strips[1](work, part, panel);
    if (panel < stop)
        strips[2](work, part, panel);
#ifdef MATRIX_TILES
    if (tiles)
        TILE_RELEASE();
#endif
}

static void multiply_panels(void *data, size_t index)
{
    const LinearWork *work = data;
    const int64_t end = end_panel(work->params, work->call);
    const int64_t panel = work->call->first_panel + (int64_t)(index % work->groups) * work->width;
    const int64_t stop = panel + work->width < end ? panel + work->width : end;
    if (16 * panel >= work->params->unread && 16 * stop <= work->params->unread_end)
        return;
    multiply_part(work, work->parts + index / work->groups, panel, stop);
}

static void quantize_rows(void *data, size_t index)
{
    const LinearWork *work = data;
    const RowParams *params = &work->params->row;
    const LinearCall *call = work->call;
    const int64_t first = work->first + (int64_t)index * QUANTIZED_ROWS, scales = row_scales(params);
    const int64_t stride = row_bytes(params);
    for (int64_t r = first; r < first + QUANTIZED_ROWS && r < work->end; r++) {
        const int64_t at = work->rows[r].place;
        const float *x = call->x + r * params->inputs;
        float *scratch = work->scratch + (int64_t)index * stride;
        int8_t *to = work->activations + at * stride;
        const bool words = is_words(work->params->bits);
        if (work->rows[r].fine)
            quantize_row((Form){true, words}, params, x, call->norm_weight, scratch, to, work->scales + at * scales,
                         work->sums + at * scales);
        else
            quantize_row((Form){false, words}, params, x, call->norm_weight, scratch, to, work->scales + at * scales,
                         work->sums + at * scales);
    }
}

/* Whether a sequence's tokens are quantized to 16 bits: it has one, and rows have one scale. */
static bool is_fine(const LinearParams *params, const LinearCall *call, int64_t sequence)
{
    if (params->row.block != 0)
        return false;
    return call->row_offsets == NULL ? call->single
                                     : call->row_offsets[sequence + 1] - call->row_offsets[sequence] == 1;
}

/* Gives rows their places, and splits them into parts of neighbors that are quantized alike. Returns their number. */
static size_t lay_out_rows(const LinearParams *params, const LinearCall *call, Row *rows, Part *parts)
{
    const int64_t sequences = call->row_offsets == NULL ? 1 : call->sequences;
    int64_t at = 0, count = 0;
    for (int64_t i = 0; i < sequences; i++) {
        const bool fine = is_fine(params, call, i);
        const int64_t end = call->row_offsets == NULL ? call->rows : call->row_offsets[i + 1];
        for (int64_t row = call->row_offsets == NULL ? 0 : call->row_offsets[i]; row < end; row++) {
            Part *last = parts + count - 1;
            if (count == 0 || last->fine != fine || last->end - last->from >= MULTIPLIED_ROWS) {
                parts[count++] = (Part){at, at, row, fine};
                last = parts + count - 1;
            }
            rows[row] = (Row){at, fine};
            at += fine || is_words(params->bits) ? 2 : 1;
            last->end = at;
        }
    }
    return (size_t)count;
}

/* Gives the rows of a call memory of this run, and `rounded`, unless that is NULL. Returns false if out of memory. */
static bool prepare_call(const LinearParams *params, const LinearCall *call, void *rounded, LinearWork *work)
{
    const int64_t stride = row_bytes(&params->row), kinds = call->row_offsets == NULL ? 1 : call->sequences;
    const size_t tasks = (size_t)((call->rows + QUANTIZED_ROWS - 1) / QUANTIZED_ROWS);
    const size_t part_bytes = (size_t)(kinds + 2 * call->rows / MULTIPLIED_ROWS + 1) * sizeof(Part);
    const size_t row_table_bytes = (size_t)call->rows * sizeof(Row), scratch_bytes = tasks * (size_t)stride * sizeof(float);
    const size_t own = rounded == NULL ? (size_t)rounded_bytes(params, call->rows) : 0;
    uint8_t *memory = thread_scratch(OF_RUN, scratch_bytes + own + part_bytes + row_table_bytes);
    if (memory == NULL)
        return false;
    const Rounded to = rounded_in(params, call->rows, rounded == NULL ? memory + scratch_bytes : rounded);
    *work = (LinearWork){.params = params, .call = call, .scratch = (float *)memory, .memory = call->weights};
    work->activations = to.activations, work->scales = to.scales, work->sums = to.sums;
    work->parts = (Part *)(memory + scratch_bytes + own);
    work->rows = (Row *)((uint8_t *)work->parts + part_bytes);
    work->part_count = lay_out_rows(params, call, work->rows, work->parts);
    work->end = call->rows;
    return true;
}

static void quantize(LinearWork *work, const Parallel *parallel)
{
    parallel_for(parallel, (size_t)((work->end - work->first + QUANTIZED_ROWS - 1) / QUANTIZED_ROWS), quantize_rows, work);
}

/* Gives the rows of a call memory of this run, and quantizes them unless they are. Returns false if out of memory. */
static bool quantize_call(const LinearParams *params, const LinearCall *call, const Parallel *parallel, LinearWork *work)
{
    if (!prepare_call(params, call, call->rounded, work))
        return false;
    if (call->rounded == NULL)
        quantize(work, parallel);
    return true;
}

static const char *linear_round(const LinearParams *params, const LinearCall *call, int64_t first, int64_t end, void *rounded,
                                const Parallel *parallel)
{
    LinearWork work;
    if (call->rows == 0)
        return NULL;
    if (params->bits == 16) {
        prepare_floats(params, call, rounded, parallel);
        return NULL;
    }
    if (!prepare_call(params, call, rounded, &work))
        return "satchel:RoundedGather: out of memory";
    work.first = first, work.end = end;
    quantize(&work, parallel);
    return NULL;
}

static int64_t linear_places(const LinearParams *params, const LinearCall *call, int64_t row)
{
    int64_t places = 0;
    for (int64_t i = 0, from = 0, end; from < row; from = end, i++) {
        end = call->row_offsets == NULL || call->row_offsets[i + 1] > row ? row : call->row_offsets[i + 1];
        places += (end - from) * (is_fine(params, call, i) || is_words(params->bits) ? 2 : 1);
    }
    return places;
}

typedef struct {
    const LinearParams *params;
    const Columns *columns;
} ColumnsWork;

/* The numbers of a row that are quantized. */
static float *mixed_of(const Columns *columns, int64_t row) { return columns->mixed + row * column_stride(columns); }

static void measure_rows(void *data, size_t index)
{
    const ColumnsWork *work = data;
    const Columns *columns = work->columns;
    const int64_t first = (int64_t)index * QUANTIZED_ROWS, mixes = work->params->row.hadamard;
    for (int64_t row = first; row < first + QUANTIZED_ROWS && row < columns->rows; row++) {
        const float *x = columns->x + row * columns->count;
        if (mixes > 0) {
            fwht(x, columns->count, mixes, mixed_of(columns, row));
            x = mixed_of(columns, row);
        }
        columns->largest[row] = largest_magnitude(x, columns->count);
    }
}

static void round_rows(void *data, size_t index)
{
    const ColumnsWork *work = data;
    const LinearParams *params = work->params;
    const Columns *columns = work->columns;
    const int64_t first = (int64_t)index * QUANTIZED_ROWS, stride = row_bytes(&params->row);
    const Rounded to = rounded_in(params, columns->rows, columns->rounded);
    const bool words = is_words(params->bits);
    for (int64_t row = first; row < first + QUANTIZED_ROWS && row < columns->rows; row++) {
        const int64_t at = words ? 2 * row : row;
        const float *x = params->row.hadamard > 0 ? mixed_of(columns, row) : columns->x + row * columns->count;
        int8_t *own = to.activations + at * stride + columns->first * (words ? 2 : 1);
        quantize_run((Form){false, words}, x, columns->count, columns->largest[row], true, own, 0, to.scales + at, to.sums + at);
    }
}

static void run_columns(void (*task)(void *, size_t), const LinearParams *params, const Columns *columns,
                        const Parallel *parallel)
{
    ColumnsWork work = {params, columns};
    parallel_for(parallel, (size_t)((columns->rows + QUANTIZED_ROWS - 1) / QUANTIZED_ROWS), task, &work);
}

static void linear_measure_columns(const LinearParams *params, const Columns *columns, const Parallel *parallel)
{
    run_columns(measure_rows, params, columns, parallel);
}

static void linear_round_columns(const LinearParams *params, const Columns *columns, const Parallel *parallel)
{
    run_columns(round_rows, params, columns, parallel);
}

static const char *linear_run(const LinearParams *params, const LinearCall *call, const Parallel *parallel)
{
    LinearWork work;
    if (params->bits == 16)
        return linear_float_run(params, call, parallel);
    if (call->rows == 0)
        return NULL;
    if (!quantize_call(params, call, parallel, &work))
        return "satchel:Linear: out of memory";
    work.width = params->row.block == 0 && call->rows > 1 ? 4 : 2;
    work.groups = (size_t)((end_panel(params, call) - call->first_panel + work.width - 1) / work.width);
    parallel_for(parallel, work.groups * work.part_count, multiply_panels, &work);
    return NULL;
}

/* Linear layers with weights in half precision: activations, products and sums are in single precision. An output is one
 * sum in the order of the inputs, each product fused with its addition, whatever the tile: a row gets the same bits alone
 * and in a batch. */
#include "vectors.h"

#include <stdbool.h>
#include <string.h>

#include "outputs.h"
#include "../linear.h"
#include "../rows.h"
#include "../scratch.h"

enum {
    FLOAT_TILE = 6,      /* rows of a register tile */
    STREAMED_ROWS = 12,  /* at most these are multiplied by halves as they are read */
    STREAMED_PANELS = 4, /* panels of a task then */
    FLOAT_ROWS = 192,    /* rows of a task that multiplies more */
    FLOAT_PANELS = TILE_VECTORS > 2 ? TILE_VECTORS : 2, /* its panels: with a gate, pairs */
    FLOAT_INPUTS = 256,  /* inputs at a time: a panel of them, as floats, stays in the first cache */
    PREPARED_ROWS = 8,   /* rows of a task that norms and transforms */
};

typedef struct {
    const LinearParams *params;
    const LinearCall *call;
    const float *x;   /* [rows, stride]: those of the call, or normed and transformed ones */
    float *prepared;  /* where these are written */
    int64_t stride;
    size_t groups; /* tasks that cover the panels */
    bool failed;
} FloatWork;

/* The sums of a task, and as floats those of its weights that it multiplies at a time. */
typedef struct {
    F16 sums[FLOAT_ROWS][FLOAT_PANELS];
    F16 weights[TILE_VECTORS][FLOAT_INPUTS];
} FloatScratch;

/* Turns the sums of a row into outputs. Gate panels come in pairs. */
static void finish_row(const FloatWork *work, int64_t row, int64_t panel, int width, const F16 *product)
{
    const LinearCall *call = work->call;
    const Gate gate = work->params->gate;
    const int64_t count = half_outputs(work->params);
    for (int p = 0; p < width; p += gate ? 2 : 1) {
        const int64_t column = gate ? (panel + p) / 2 : panel + p, first = column * LANES;
        F16 value = add(product[p], bias_of(call, first, count));
        if (gate)
            value = mul(activate(gate, value), add(product[p + 1], bias_of(call, count + first, 2 * count)));
        put_outputs(call, row, column, count, value);
    }
}

static const uint16_t *panel_halves(const FloatWork *work, int64_t panel)
{
    return (const uint16_t *)(const void *)(work->call->weights + panel * panel_bytes(work->params));
}

/* Panels whose sums with some rows are in registers together. */
INLINE int streamed_at_once(const int rows)
{
    return rows == 1 ? STREAMED_PANELS : rows == 2 ? (PARTS == 1 ? 4 : 2) : TILE_VECTORS;
}

/* Sums of some rows times `width` panels. The panels that come next are fetched on the way: processors do not fetch ahead
 * across pages by themselves. */
INLINE void stream_sums(const int rows, const int width, const FloatWork *work, const float *x, int64_t panel,
                        const bool ahead, F16 (*product)[STREAMED_PANELS], const int place)
{
    const int64_t inputs = work->params->row.inputs, apart = inputs * LANES;
    const uint16_t *halves = panel_halves(work, panel);
    F16 sum[FLOAT_TILE][STREAMED_PANELS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int p = 0; p < width; p++)
            sum[r][p] = floats(0);
    for (int64_t i = 0; i < inputs; i++) {
        F16 weights[STREAMED_PANELS];
        UNROLL
        for (int p = 0; p < width; p++) {
            const uint16_t *from = halves + p * apart + i * LANES;
            if (ahead)
                __builtin_prefetch(from + width * apart, 0, 2);
            weights[p] = load_halves(from);
        }
        UNROLL
        for (int r = 0; r < rows; r++) {
            const F16 each = floats(x[r * work->stride + i]);
            UNROLL
            for (int p = 0; p < width; p++)
                sum[r][p] = mul_add(weights[p], each, sum[r][p]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int p = 0; p < width; p++)
            product[r][place + p] = sum[r][p];
}

/* The same to outputs. */
INLINE void stream_tile(const int rows, const int width, const FloatWork *work, int64_t row, int64_t panel)
{
    const int most = streamed_at_once(rows), at_once = most < width ? most : width;
    F16 product[FLOAT_TILE][STREAMED_PANELS];
    UNROLL
    for (int p = 0; p < width; p += at_once)
        stream_sums(rows, at_once, work, work->x + row * work->stride, panel + p, row == 0, product, p);
    for (int r = 0; r < rows; r++)
        finish_row(work, row + r, panel, width, product[r]);
}

INLINE void stream_rows(const int width, const FloatWork *work, int64_t panel)
{
    const int64_t rows = work->call->rows;
    int64_t row = 0;
#define STREAM(n)                           \
    for (; row + n <= rows; row += n) \
        stream_tile(n, width, work, row, panel);
    STREAM(6)
    STREAM(4)
    STREAM(3)
    STREAM(2)
    STREAM(1)
#undef STREAM
}

static void stream_panels(void *data, size_t index)
{
    const FloatWork *work = data;
    const int64_t end = end_panel(work->params, work->call);
    int64_t panel = work->call->first_panel + (int64_t)index * STREAMED_PANELS;
    const int64_t stop = panel + STREAMED_PANELS < end ? panel + STREAMED_PANELS : end;
    for (; panel + 4 <= stop; panel += 4)
        stream_rows(4, work, panel);
    for (; panel + 2 <= stop; panel += 2)
        stream_rows(2, work, panel);
    if (panel < stop)
        stream_rows(1, work, panel);
}

/* Adds the products of `inputs` inputs to the sums of some rows and panels. */
INLINE void float_tile(const int rows, const int width, const FloatWork *work, const float *x,
                       const F16 (*weights)[FLOAT_INPUTS], int64_t inputs, F16 (*sums)[FLOAT_PANELS], int panel)
{
    F16 sum[FLOAT_TILE][FLOAT_PANELS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int p = 0; p < width; p++)
            sum[r][p] = sums[r][panel + p];
    for (int64_t i = 0; i < inputs; i++) {
        F16 shared[FLOAT_PANELS];
        UNROLL
        for (int p = 0; p < width; p++)
            shared[p] = load_once((const float *)&weights[p][i]);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const F16 each = floats(x[r * work->stride + i]);
            UNROLL
            for (int p = 0; p < width; p++)
                sum[r][p] = mul_add(shared[p], each, sum[r][p]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int p = 0; p < width; p++)
            sums[r][panel + p] = sum[r][p];
}

/* The same of `rows` rows. */
INLINE void float_strip(const int width, const FloatWork *work, const float *x, int64_t rows, FloatScratch *scratch,
                        int64_t inputs, int panel)
{
#define FLOAT_ROWS_OF(n)                                                                                          \
    for (; r + n <= rows; r += n)                                                                                 \
        float_tile(n, width, work, x + r * work->stride, (const F16(*)[FLOAT_INPUTS])scratch->weights, inputs, \
                   scratch->sums + r, panel);
    int64_t r = 0;
    FLOAT_ROWS_OF(6)
    FLOAT_ROWS_OF(4)
    FLOAT_ROWS_OF(2)
    FLOAT_ROWS_OF(1)
#undef FLOAT_ROWS_OF
}

/* Halves to floats; the panel's next inputs, or the next panel, are fetched on the way. */
static void widen(const uint16_t *halves, int64_t inputs, F16 *weights)
{
    for (int64_t i = 0; i < inputs; i++) {
        __builtin_prefetch(halves + (i + FLOAT_INPUTS) * LANES, 0, 2);
        weights[i] = load_halves(halves + i * LANES);
    }
}

static void multiply_floats(void *data, size_t index)
{
    FloatWork *work = data;
    const int64_t whole = panels(work->params), inputs = work->params->row.inputs;
    const int64_t row = (int64_t)(index / work->groups) * FLOAT_ROWS, left = work->call->rows - row;
    const int64_t rows = left < FLOAT_ROWS ? left : FLOAT_ROWS;
    const int64_t panel = (int64_t)(index % work->groups) * FLOAT_PANELS;
    const int width = (int)(whole - panel < FLOAT_PANELS ? whole - panel : FLOAT_PANELS);
    FloatScratch *scratch = thread_scratch(OF_TASK, sizeof *scratch);
    if (scratch == NULL) {
        __atomic_store_n(&work->failed, true, __ATOMIC_RELAXED);
        return;
    }
    memset(scratch->sums, 0, (size_t)rows * sizeof scratch->sums[0]);
    for (int p = 0; p < width;) {
        const int at_once = width - p < TILE_VECTORS ? 1 : TILE_VECTORS;
        for (int64_t from = 0; from < inputs; from += FLOAT_INPUTS) {
            const int64_t some = inputs - from < FLOAT_INPUTS ? inputs - from : FLOAT_INPUTS;
            const float *x = work->x + row * work->stride + from;
            for (int each = 0; each < at_once; each++)
                widen(panel_halves(work, panel + p + each) + from * LANES, some, scratch->weights[each]);
            if (at_once == TILE_VECTORS)
                float_strip(TILE_VECTORS, work, x, rows, scratch, some, p);
            else
                float_strip(1, work, x, rows, scratch, some, p);
        }
        p += at_once;
    }
    for (int64_t r = 0; r < rows; r++)
        finish_row(work, row + r, panel, width, scratch->sums[r]);
}

static void prepare_rows(void *data, size_t index)
{
    const FloatWork *work = data;
    const LinearCall *call = work->call;
    const RowParams *params = &work->params->row;
    const int64_t first = (int64_t)index * PREPARED_ROWS;
    for (int64_t r = first; r < first + PREPARED_ROWS && r < call->rows; r++) {
        const float *x = call->x + r * params->inputs;
        float *prepared = work->prepared + r * work->stride, largest;
        if (prepare_row(params, x, call->norm_weight, prepared, &largest) == x)
            memcpy(prepared, x, (size_t)params->inputs * sizeof *x);
    }
}

static size_t in_tasks(int64_t count, int64_t each) { return (size_t)((count + each - 1) / each); }

/* Norms and transforms the rows of a call, into memory of rounded_bytes. */
static void prepare_floats(const LinearParams *params, const LinearCall *call, void *prepared, const Parallel *parallel)
{
    FloatWork work = {.params = params, .call = call, .prepared = prepared, .stride = row_bytes(&params->row)};
    parallel_for(parallel, in_tasks(call->rows, PREPARED_ROWS), prepare_rows, &work);
}

static const char *linear_float_run(const LinearParams *params, const LinearCall *call, const Parallel *parallel)
{
    static const char *out_of_memory = "satchel:Linear: out of memory";
    const int64_t whole = end_panel(params, call) - call->first_panel;
    FloatWork work = {.params = params, .call = call, .x = call->x, .stride = params->row.inputs};
    if (call->rows == 0)
        return NULL;
    if (call->rounded != NULL) {
        work.stride = row_bytes(&params->row);
        work.x = call->rounded;
    } else if (params->row.epsilon > 0 || params->row.hadamard > 0) {
        work.stride = row_bytes(&params->row);
        void *prepared = thread_scratch(OF_RUN, (size_t)rounded_bytes(params, call->rows));
        if (prepared == NULL)
            return out_of_memory;
        prepare_floats(params, call, prepared, parallel);
        work.x = prepared;
    }
    if (call->rows <= STREAMED_ROWS) {
        parallel_for(parallel, in_tasks(whole, STREAMED_PANELS), stream_panels, &work);
        return NULL;
    }
    work.groups = in_tasks(whole, FLOAT_PANELS);
    parallel_for(parallel, work.groups * in_tasks(call->rows, FLOAT_ROWS), multiply_floats, &work);
    return work.failed ? out_of_memory : NULL;
}

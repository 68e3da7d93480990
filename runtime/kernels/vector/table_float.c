/* Linear layers over an embedding table in half precision. Lane i of a sum adds the products of inputs i, i + 16, ... in
 * order, and the lanes are added as in sum_of. */
#include "vectors.h"

#include <stdbool.h>
#include <string.h>

#include "../table.h"

enum {
    HALF_ROWS = 256,  /* rows of the table that a task takes */
    HALF_AHEAD = 4096, /* bytes that are fetched ahead */
};

/* `rows` rows of activations, one or two, times `outputs` rows of the table. */
INLINE void half_tile(const int rows, const int outputs, const TableParams *params, const TableCall *call, int64_t row,
                      int64_t output)
{
    const int64_t inputs = params->row.inputs;
    const float *x = call->x + row * inputs;
    const uint16_t *halves = (const uint16_t *)call->weights + output * inputs;
    F16 sum[2][4];
    UNROLL
    for (int o = 0; o < outputs; o++)
        sum[0][o] = sum[1][o] = floats(0);
    for (int64_t i = 0; i < inputs; i += LANES) {
        const int64_t left = inputs - i;
        const bool all = left >= LANES;
        const F16 first = all ? load(x + i) : load_some(x + i, left);
        const F16 second = rows == 1 ? first : all ? load(x + inputs + i) : load_some(x + inputs + i, left);
        UNROLL
        for (int o = 0; o < outputs; o++) {
            const uint16_t *from = halves + o * inputs + i;
            __builtin_prefetch((const uint8_t *)from + HALF_AHEAD, 0, 2);
            const F16 weights = all ? load_halves(from) : load_some_halves(from, left);
            sum[0][o] = mul_add(weights, first, sum[0][o]);
            if (rows == 2)
                sum[1][o] = mul_add(weights, second, sum[1][o]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < outputs; o++)
            call->y[(row + r) * params->outputs + output + o] = sum_of(sum[r][o]);
}

typedef struct {
    const TableParams *params;
    const TableCall *call;
} HalfTable;

static void multiply_half_table(void *data, size_t index)
{
    const HalfTable *work = data;
    const TableParams *params = work->params;
    const int64_t rows = work->call->rows, first = (int64_t)index * HALF_ROWS;
    const int64_t end = first + HALF_ROWS < params->outputs ? first + HALF_ROWS : params->outputs;
    int64_t o = first;
    for (; rows == 1 && o + 4 <= end; o += 4)
        half_tile(1, 4, params, work->call, 0, o);
    for (; o + 2 <= end; o += 2) {
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2)
            half_tile(2, 2, params, work->call, r, o);
        if (r < rows)
            half_tile(1, 2, params, work->call, r, o);
    }
    for (int64_t r = 0; o < end && r < rows; r++)
        half_tile(1, 1, params, work->call, r, o);
}

static void half_table_run(const TableParams *params, const TableCall *call, const Parallel *parallel)
{
    HalfTable work = {params, call};
    parallel_for(parallel, (size_t)((params->outputs + HALF_ROWS - 1) / HALF_ROWS), multiply_half_table, &work);
}

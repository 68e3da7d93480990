#include "vectors.h"

#include <string.h>

#include "../rounding.h"

enum { HALF = LANES / 2, LEAF = 16, COLUMNS = 2 * LANES };

/* The nearest whole number, or even, for magnitudes below 2^22; others stay beyond the bounds of quantized values. */
INLINE F16 whole_of(F16 v)
{
    const F16 shift = floats(12582912.f); /* 1.5 * 2^23 */
    return sub(add(v, shift), shift);
}

INLINE F16 clip(F16 v, F16 low, F16 high) { return smaller(high, larger(low, v)); } /* NaN stays */

/* Two groups side by side, as 8 lanes of each vector. */
static void interleave(const float *a, const float *b, int64_t width, float *to)
{
    for (int64_t i = 0; i < width; i += HALF) {
        memcpy(to + 2 * i, a + i, HALF * sizeof *a);
        memcpy(to + 2 * i + HALF, b + i, HALF * sizeof *b);
    }
}

/* The summed squared errors of two groups of 8 * vectors weights, in all lanes of each. The sums are numpy's: pairwise,
 * with eight sums for up to 128 numbers. */
static void sum_errors(const ScalesCall *call, const float *weights, const float *counts, int64_t vectors,
                       const float *scales, const float *zeros, float *sums)
{
    if (vectors > LEAF) {
        const int64_t half = vectors / 2;
        float rest[LANES];
        sum_errors(call, weights, counts, half, scales, zeros, sums);
        sum_errors(call, weights + half * LANES, counts == NULL ? NULL : counts + half * LANES, vectors - half, scales, zeros,
                   rest);
        store(sums, add(load(sums), load(rest)));
        return;
    }
    const F16 scale = load(scales), zero = load(zeros), low = floats(call->low), high = floats(call->high);
    F16 sum = floats(0);
    for (int64_t i = 0; i < vectors; i++) {
        const F16 weight = load(weights + i * LANES);
        const F16 code = sub(clip(add(whole_of(divide(weight, scale)), zero), low, high), zero);
        const F16 error = sub(mul(code, scale), weight);
        F16 square = mul(error, error);
        if (counts != NULL)
            square = mul(square, load(counts + i * LANES));
        sum = i == 0 ? square : add(sum, square);
    }
    sum = add(sum, swap_1(sum));
    sum = add(sum, swap_2(sum));
    store(sums, add(sum, swap_4(sum)));
}

static void choose_scales(const ScalesCall *call)
{
    const int64_t width = call->width, vectors = width / HALF;
    float *weights = call->scratch, *counts = call->counts == NULL ? NULL : weights + 2 * width;
    float *scales = weights + 4 * width, *zeros = scales + LANES * call->candidates;
    for (int64_t g = 0; g < call->groups; g += 2) {
        const int64_t pair[2] = {g, g + 1 < call->groups ? g + 1 : g};
        interleave(call->weights + pair[0] * width, call->weights + pair[1] * width, width, weights);
        if (counts != NULL)
            interleave(call->counts + pair[0] % call->kinds * width, call->counts + pair[1] % call->kinds * width, width, counts);
        for (int64_t c = 0; c < call->candidates; c++)
            for (int64_t i = 0; i < LANES; i++) {
                const int64_t from = c * call->groups + pair[i / HALF];
                scales[c * LANES + i] = call->scales[from];
                zeros[c * LANES + i] = call->zeros == NULL ? 0 : call->zeros[from];
            }
        float least[2];
        int32_t best[2] = {0, 0};
        for (int64_t c = 0; c < call->candidates; c++) {
            float sums[LANES];
            sum_errors(call, weights, counts, vectors, scales + c * LANES, zeros + c * LANES, sums);
            for (int i = 0; i < 2; i++)
                if (c == 0 || sums[i * HALF] < least[i]) {
                    least[i] = sums[i * HALF];
                    best[i] = (int32_t)c;
                }
        }
        call->best[pair[1]] = best[1];
        call->best[pair[0]] = best[0];
    }
}

/* Rounds the inputs of up to COLUMNS outputs, in the order of GPTQ, or of coordinate descent. */
INLINE void round_columns(const bool descend, const InputsCall *call, int64_t column, int64_t left)
{
    float values[MAX_INPUTS][COLUMNS];
    const int64_t inputs = call->inputs, outputs = call->outputs;
    const F16 low = floats(call->low), high = floats(call->high);
    for (int64_t i = 0; i < inputs; i++)
        for (int64_t c = 0; c < COLUMNS; c += LANES)
            store(values[i] + c, load_some(call->values + i * outputs + column + c, left - c));
    for (int64_t i = 0; i < inputs; i++) {
        const float *square = call->square + i * call->stride;
        const F16 own = floats(descend ? -square[i] : square[i]);
        F16 moved[COLUMNS / LANES];
        for (int64_t v = 0; v < COLUMNS / LANES; v++) {
            const int64_t at = i * outputs + column + v * LANES, rest = left - v * LANES;
            const int64_t group = call->group_of[i] * outputs + column + v * LANES;
            const F16 scale = load_some(call->scales + group, rest), value = load(values[i] + v * LANES);
            const F16 zero = call->zeros == NULL ? floats(0) : load_some(call->zeros + group, rest);
            F16 code;
            if (descend) {
                const F16 before = load_some(call->codes + at, rest);
                code = clip(whole_of(add(divide(value, mul(scale, own)), before)), low, high);
                moved[v] = mul(sub(code, before), scale);
            } else {
                code = clip(add(whole_of(divide(value, scale)), zero), low, high);
                moved[v] = divide(sub(value, mul(sub(code, zero), scale)), own);
            }
            store_some(call->codes + at, rest, code);
            store_some(call->moved + at, rest, moved[v]);
        }
        for (int64_t j = i + 1; j < inputs; j++) {
            const F16 factor = floats(square[j]);
            UNROLL
            for (int64_t v = 0; v < COLUMNS / LANES; v++) {
                const F16 change = mul(factor, moved[v]), now = load(values[j] + v * LANES);
                store(values[j] + v * LANES, descend ? add(now, change) : sub(now, change));
            }
        }
    }
}

static void round_inputs(const InputsCall *call)
{
    for (int64_t column = 0; column < call->outputs; column += COLUMNS)
        round_columns(false, call, column, call->outputs - column);
}

static void descend_inputs(const InputsCall *call)
{
    for (int64_t column = 0; column < call->outputs; column += COLUMNS)
        round_columns(true, call, column, call->outputs - column);
}

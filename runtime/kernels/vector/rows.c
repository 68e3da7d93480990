#include "vectors.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "../rows.h"

#define LEVELS 127.f
#define SMALLEST 1e-10f /* lower bound of a row's largest magnitude */

/* 1 / root mean square:  Zhang and Sennrich, Root Mean Square Layer Normalization (2019). */
static float inverse_rms(const float *x, int64_t count, float epsilon)
{
    F16 sum = floats(0);
    for (int64_t i = 0; i < count; i += LANES) {
        F16 v = load_some(x + i, count - i);
        sum = mul_add(v, v, sum);
    }
    return 1 / sqrtf(sum_of(sum) / (float)count + epsilon);
}

/* Pairs of lanes become their sum and their difference; the upper lanes of the pairs have bit `step`. */
INLINE F16 sum_and_difference(F16 v, F16 other, int step)
{
    return add(other, flip_where(both(lane_numbers(), ints(step)), v));
}

/* Fast Walsh-Hadamard transform in Sylvester order, `n` numbers at a time, divided by sqrt(n). `x` is padded to whole
 * vectors; if n is below 16, a vector holds several transforms. */
static void fwht(float *x, int64_t count, int64_t n)
{
    const F16 scale = floats(1 / sqrtf((float)n));
    for (int64_t i = 0; i < count; i += LANES) {
        F16 v = mul(load(x + i), scale);
        if (n > 1)
            v = sum_and_difference(v, swap_1(v), 1);
        if (n > 2)
            v = sum_and_difference(v, swap_2(v), 2);
        if (n > 4)
            v = sum_and_difference(v, swap_4(v), 4);
        if (n > 8)
            v = sum_and_difference(v, swap_8(v), 8);
        store(x + i, v);
    }
    for (int64_t step = LANES; step < n; step *= 2)
        for (int64_t start = 0; start < count; start += 2 * step)
            for (int64_t i = start; i < start + step; i += LANES) {
                F16 a = load(x + i), b = load(x + i + step);
                store(x + i, add(a, b));
                store(x + i + step, sub(a, b));
            }
}

/* Quantizes `count` numbers with one scale. Writes whole vectors unless `tight`. */
static void quantize_run(const float *x, int64_t count, bool tight, int8_t *quantized, float *scale, int32_t *sum)
{
    F16 largest = floats(0);
    I16 ordered = ints(-1), total = ints(0);
    for (int64_t i = 0; i < count; i += LANES) {
        F16 v = load_some(x + i, count - i);
        ordered = both(ordered, is_equal(v, v));
        largest = larger(magnitude(v), largest);
    }
    float whole = fmaxf(largest_of(largest), SMALLEST);
    F16 factor = floats(LEVELS / whole);
    for (int64_t i = 0; i < count; i += LANES) {
        F16 step = mul(load_some(x + i, count - i), factor);
        I16 value = nearest(choose(is_equal(step, step), step, floats(0))); /* NaN: 0 */
        total = add_ints(total, value);
        store_bytes(quantized + i, value, tight ? count - i : LANES);
    }
    *scale = all_of(ordered) ? whole / LEVELS : NAN;
    *sum = sum_of_ints(total);
}

/* Returns the row to quantize: `x` itself, or its norm and Hadamard transform in `scratch`. */
static const float *prepare_row(const RowParams *params, const float *x, const float *norm_weight, float *scratch)
{
    const int64_t count = params->inputs;
    if (params->epsilon <= 0 && params->hadamard == 0)
        return x;
    const F16 factor = floats(params->epsilon > 0 ? inverse_rms(x, count, params->epsilon) : 1);
    for (int64_t i = 0; i < count; i += LANES) {
        F16 v = mul(load_some(x + i, count - i), factor);
        if (norm_weight != NULL)
            v = mul(v, load_some(norm_weight + i, count - i));
        store(scratch + i, v);
    }
    if (params->hadamard > 0)
        fwht(scratch, count, params->hadamard);
    return scratch;
}

/* Sets the padding after `count` values to zero. */
static void fill_up(const RowParams *params, int8_t *quantized, int64_t count)
{
    memset(quantized + count, 0, (size_t)(row_bytes(params) - count));
}

static int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* Quantizes one row: int8 values [row_bytes], and for each block its scale and the sum of its values.
 * `norm_weight` [inputs] or NULL; `scratch` [row_bytes] floats. A row with a NaN gets NaN scales. */
static void quantize_row(const RowParams *params, const float *x, const float *norm_weight, float *scratch, int8_t *quantized,
                  float *scales, int32_t *sums)
{
    const int64_t count = params->inputs, block = params->block;
    x = prepare_row(params, x, norm_weight, scratch);
    if (block == 0)
        quantize_run(x, count, false, quantized, scales, sums);
    else
        for (int64_t b = 0; b < count / block; b++)
            quantize_run(x + b * block, block, true, quantized + b * block, scales + b, sums + b);
    fill_up(params, quantized, block ? count : whole_vectors(count));
}

/* Quantizes a row with one scale, and then its quantization error. The second values, scale and sum follow the first;
 * their sum is within 1/64,000 of the row's largest magnitude. */
static void quantize_row_twice(const RowParams *params, const float *x, const float *norm_weight, float *scratch,
                        int8_t *quantized, float *scales, int32_t *sums)
{
    const int64_t count = params->inputs;
    x = prepare_row(params, x, norm_weight, scratch);
    quantize_run(x, count, false, quantized, scales, sums);
    fill_up(params, quantized, whole_vectors(count));
    const F16 scale = floats(scales[0]);
    for (int64_t i = 0; i < count; i += LANES)
        store(scratch + i, mul_sub_from(to_floats(load_signed(quantized + i)), scale, load_some(x + i, count - i)));
    quantized += row_bytes(params);
    quantize_run(scratch, count, false, quantized, scales + 1, sums + 1);
    fill_up(params, quantized, whole_vectors(count));
}

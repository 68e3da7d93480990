#include "vectors.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "../rows.h"

/* An instruction set may multiply 8-bit weights by WORDS of 16 bits, as which quantized values are then stored. */
#ifndef WORDS
#define WORDS 0
#endif

#define LEVELS 127.f
#define FINE_LEVELS 32512.f /* 127 * 256: the upper half fits 8 bits, too */
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

/* A vector's own steps of a transform of `n` numbers, of which several are in a vector if n is below 16. */
INLINE F16 fwht_lanes(F16 v, int64_t n)
{
    if (n > 1)
        v = sum_and_difference(v, swap_1(v), 1);
    if (n > 2)
        v = sum_and_difference(v, swap_2(v), 2);
    if (n > 4)
        v = sum_and_difference(v, swap_4(v), 4);
    if (n > 8)
        v = sum_and_difference(v, swap_8(v), 8);
    return v;
}

INLINE void sums_and_differences(F16 *a, F16 *b)
{
    const F16 sum = add(*a, *b);
    *b = sub(*a, *b);
    *a = sum;
}

/* The steps `step` and twice as far, of numbers that are in these four vectors. */
INLINE void fwht_fours(F16 v[4])
{
    sums_and_differences(v, v + 1);
    sums_and_differences(v + 2, v + 3);
    sums_and_differences(v, v + 2);
    sums_and_differences(v + 1, v + 3);
}

/* Fast Walsh-Hadamard transform in Sylvester order of `from`, `n` numbers at a time, divided by sqrt(n). `x` is padded to
 * whole vectors, and may be `from`. Two steps are taken together, as each pass over the numbers costs as much as its sums. */
static void fwht(const float *from, int64_t count, int64_t n, float *x)
{
    enum { FOURS = 4 * LANES };
    const F16 scale = floats(1 / sqrtf((float)n));
    int64_t step = LANES;
    if (n < FOURS) {
        for (int64_t i = 0; i < count; i += LANES)
            store(x + i, fwht_lanes(mul(load_some(from + i, count - i), scale), n));
    } else {
        for (int64_t i = 0; i < count; i += FOURS) {
            F16 v[4];
            UNROLL
            for (int k = 0; k < 4; k++)
                v[k] = fwht_lanes(mul(load(from + i + k * LANES), scale), LANES);
            fwht_fours(v);
            UNROLL
            for (int k = 0; k < 4; k++)
                store(x + i + k * LANES, v[k]);
        }
        step = FOURS;
    }
    for (; 2 * step < n; step *= 4)
        for (int64_t start = 0; start < count; start += 4 * step)
            for (int64_t i = start; i < start + step; i += LANES) {
                F16 v[4];
                UNROLL
                for (int k = 0; k < 4; k++)
                    v[k] = load(x + i + k * step);
                fwht_fours(v);
                UNROLL
                for (int k = 0; k < 4; k++)
                    store(x + i + k * step, v[k]);
            }
    if (step < n)
        for (int64_t start = 0; start < count; start += 2 * step)
            for (int64_t i = start; i < start + step; i += LANES) {
                F16 a = load(x + i), b = load(x + i + step);
                sums_and_differences(&a, &b);
                store(x + i, a);
                store(x + i + step, b);
            }
}

/* How values are quantized: to 8 bits or, `fine`, to 16, and stored: as words, or as bytes, fine ones in two runs:
 * 256 * upper + lower. */
typedef struct {
    bool fine, words;
} Form;

INLINE void store_values(const Form form, int8_t *to, int64_t apart, int64_t i, I16 value, I16 upper, int64_t left)
{
#if WORDS
    if (form.words) {
        store_words((int16_t *)to + i, value, left);
        return;
    }
#endif
    store_bytes(to + i, upper, left);
    if (form.fine)
        store_bytes(to + apart + i, sub_ints(value, mul_ints(upper, ints(256))), left);
}

INLINE void note_largest(F16 v, F16 *largest, I16 *ordered)
{
    *ordered = both(*ordered, is_equal(v, v));
    *largest = larger(magnitude(v), *largest);
}

/* Quantizes `count` numbers with one scale; the second run of bytes is `apart` bytes from the first. `sums`: of the values,
 * or of their upper and of their lower halves. Writes whole vectors unless `tight`. */
INLINE void quantize_run(const Form form, const float *x, int64_t count, bool tight, int8_t *quantized, int64_t apart,
                         float *scale, int32_t *sums)
{
    const float levels = form.fine ? FINE_LEVELS : LEVELS;
    F16 largest = floats(0);
    I16 ordered = ints(-1), total = ints(0), total_upper = ints(0);
    const int64_t full = count / LANES * LANES;
    for (int64_t i = 0; i < full; i += LANES)
        note_largest(load(x + i), &largest, &ordered);
    if (full < count)
        note_largest(load_some(x + full, count - full), &largest, &ordered);
    float whole = fmaxf(largest_of(largest), SMALLEST);
    F16 factor = floats(levels / whole);
    for (int64_t i = 0; i < count; i += LANES) {
        F16 step = mul(load_some(x + i, count - i), factor);
        I16 value = nearest(choose(is_equal(step, step), step, floats(0))), upper = value; /* NaN: 0 */
        if (form.fine)
            EACH_PART upper.part[i] = (value.part[i] + 128) >> 8;
        total = add_ints(total, value);
        total_upper = add_ints(total_upper, upper);
        store_values(form, quantized, apart, i, value, upper, tight ? count - i : LANES);
    }
    *scale = all_of(ordered) ? whole / levels : NAN;
    sums[0] = sum_of_ints(form.fine ? total_upper : total);
    if (form.fine)
        sums[1] = sum_of_ints(sub_ints(total, mul_ints(total_upper, ints(256))));
}

/* Returns the row to quantize: `x` itself, or its norm and Hadamard transform in `scratch`. */
static const float *prepare_row(const RowParams *params, const float *x, const float *norm_weight, float *scratch)
{
    const int64_t count = params->inputs;
    if (params->epsilon > 0) {
        const F16 factor = floats(inverse_rms(x, count, params->epsilon));
        for (int64_t i = 0; i < count; i += LANES) {
            F16 v = mul(load_some(x + i, count - i), factor);
            if (norm_weight != NULL)
                v = mul(v, load_some(norm_weight + i, count - i));
            store(scratch + i, v);
        }
        x = scratch;
    }
    if (params->hadamard > 0) {
        fwht(x, count, params->hadamard, scratch);
        x = scratch;
    }
    return x;
}

static int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* Quantizes one row to values of 8 bits: for each block its scale and the sum of its values; or `fine`, to values of 16 bits
 * with one scale: two sums, of the upper and the lower halves. `quantized` has one place of row_bytes, or two for words or fine
 * values; what follows the values is zero. `norm_weight` [inputs] or NULL; `scratch` [row_bytes] floats. A row with a NaN
 * gets NaN scales. */
INLINE void quantize_row(const Form form, const RowParams *params, const float *x, const float *norm_weight, float *scratch,
                         int8_t *quantized, float *scales, int32_t *sums)
{
    const int64_t count = params->inputs, block = params->block, size = form.words ? 2 : 1, place = row_bytes(params);
    const int64_t written = block ? count : whole_vectors(count);
    x = prepare_row(params, x, norm_weight, scratch);
    if (block == 0)
        quantize_run(form, x, count, false, quantized, place, scales, sums);
    else
        for (int64_t b = 0; b < count / block; b++)
            quantize_run(form, x + b * block, block, true, quantized + b * block * size, place, scales + b, sums + b);
    memset(quantized + written * size, 0, (size_t)((place - written) * size));
    if (form.fine && !form.words)
        memset(quantized + place + written, 0, (size_t)(place - written));
}

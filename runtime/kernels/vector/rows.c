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
    const int64_t full = count / LANES * LANES;
    F16 sum = floats(0);
    for (int64_t i = 0; i < full; i += LANES)
        sum = mul_add(load(x + i), load(x + i), sum);
    if (full < count) {
        const F16 rest = load_some(x + full, count - full);
        sum = mul_add(rest, rest, sum);
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

/* Magnitudes as integers have the same order, and those of NaNs are beyond infinity. */
INLINE I16 larger_magnitude(I16 largest, F16 v)
{
    return larger_int(largest, both(bits_of(v), ints(0x7fffffff)));
}

static float largest_magnitude(const float *x, int64_t count)
{
    const int64_t full = count / LANES * LANES;
    I16 largest = ints(0);
    for (int64_t i = 0; i < full; i += LANES)
        largest = larger_magnitude(largest, load(x + i));
    if (full < count)
        largest = larger_magnitude(largest, load_some(x + full, count - full));
    return largest_of_magnitudes(largest);
}

/* The numbers of a run that are quantized next: 16, or the last ones. */
INLINE void quantize_some(const Form form, const bool whole, const float *x, int64_t left, F16 factor, int8_t *quantized,
                          int64_t apart, int64_t i, int64_t stored, I16 *total, I16 *total_upper)
{
    const I16 value = nearest(mul(load_up_to(whole, x + i, left), factor));
    I16 upper = value;
    *total = add_ints(*total, value);
    if (form.fine) {
        EACH_PART upper.part[i] = (value.part[i] + 128) >> 8;
        *total_upper = add_ints(*total_upper, upper);
    }
    store_values(form, quantized, apart, i, value, upper, stored);
}

/* Quantizes `count` numbers with one scale; the second run of bytes is `apart` bytes from the first. `sums`: of the values,
 * or of their upper and of their lower halves. Writes whole vectors unless `tight`. `largest`: the largest magnitude. */
INLINE void quantize_run(const Form form, const float *x, int64_t count, float largest, bool tight, int8_t *quantized,
                         int64_t apart, float *scale, int32_t *sums)
{
    const float levels = form.fine ? FINE_LEVELS : LEVELS, most = fmaxf(largest, SMALLEST);
    const int64_t full = count / LANES * LANES, left = count - full;
    const bool finite = largest < INFINITY; /* else outputs are NaN, whatever the values are */
    const F16 factor = floats(levels / most);
    I16 total = ints(0), total_upper = ints(0);
    for (int64_t i = 0; finite && i < full; i += LANES)
        quantize_some(form, true, x, LANES, factor, quantized, apart, i, LANES, &total, &total_upper);
    if (finite && left > 0)
        quantize_some(form, false, x, left, factor, quantized, apart, full, tight ? left : LANES, &total, &total_upper);
    if (!finite) {
        const size_t bytes = (size_t)((tight ? count : (count + LANES - 1) / LANES * LANES) * (form.words ? 2 : 1));
        memset(quantized, 0, bytes);
        if (form.fine && !form.words)
            memset(quantized + apart, 0, bytes);
    }
    *scale = finite ? most / levels : NAN;
    sums[0] = sum_of_ints(form.fine ? total_upper : total);
    if (form.fine)
        sums[1] = sum_of_ints(sub_ints(total, mul_ints(total_upper, ints(256))));
}

/* The root mean square norm of 16 numbers, or of the first `left` of them. */
INLINE F16 norm_some(const bool whole, const float *x, const float *norm_weight, int64_t left, F16 factor)
{
    const F16 v = mul(load_up_to(whole, x, left), factor);
    return norm_weight == NULL ? v : mul(v, load_up_to(whole, norm_weight, left));
}

/* Writes a norm to `to`, whole vectors, and returns the largest magnitude. */
static float norm_row(const RowParams *params, const float *x, const float *norm_weight, float *to)
{
    const int64_t count = params->inputs, full = count / LANES * LANES;
    const F16 factor = floats(inverse_rms(x, count, params->epsilon));
    I16 largest = ints(0);
    for (int64_t i = 0; i < count; i += LANES) {
        const float *weight = norm_weight == NULL ? NULL : norm_weight + i;
        const F16 v = i < full ? norm_some(true, x + i, weight, LANES, factor)
                               : norm_some(false, x + i, weight, count - i, factor);
        largest = larger_magnitude(largest, v);
        store(to + i, v);
    }
    return largest_of_magnitudes(largest);
}

/* Returns the row to quantize: `x` itself, or its norm and Hadamard transform in `scratch`. Sets `largest` to its largest
 * magnitude, or to -1 if that is not known yet. */
static const float *prepare_row(const RowParams *params, const float *x, const float *norm_weight, float *scratch,
                                float *largest)
{
    *largest = -1;
    if (params->epsilon > 0) {
        *largest = norm_row(params, x, norm_weight, scratch);
        x = scratch;
    }
    if (params->hadamard > 0) {
        fwht(x, params->inputs, params->hadamard, scratch);
        *largest = -1;
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
    const int64_t run = block ? block : count; /* numbers with one scale */
    float largest;
    x = prepare_row(params, x, norm_weight, scratch, &largest);
    for (int64_t b = 0; b < count / run; b++)
        quantize_run(form, x + b * run, run, block || largest < 0 ? largest_magnitude(x + b * run, run) : largest, block != 0,
                     quantized + b * run * size, place, scales + b, sums + b);
    memset(quantized + written * size, 0, (size_t)((place - written) * size));
    if (form.fine && !form.words)
        memset(quantized + place + written, 0, (size_t)(place - written));
}

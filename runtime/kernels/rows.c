#include "vectors.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "rows.h"

#define LEVELS 127.f
#define SMALLEST 1e-10f /* lower bound of a row's largest magnitude */

/* 1 / root mean square:  Zhang and Sennrich, Root Mean Square Layer Normalization (2019). */
static float inverse_rms(const float *x, int64_t count, float epsilon)
{
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 v = _mm512_maskz_loadu_ps(lanes(count - i), x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1 / sqrtf(_mm512_reduce_add_ps(sum) / (float)count + epsilon);
}

/* One stage within a vector: pairs `step` lanes apart become their sum and difference. */
INLINE __m512 butterfly(__m512 v, int step, __mmask16 upper)
{
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(step)), v);
    return _mm512_mask_sub_ps(_mm512_add_ps(v, other), upper, other, v);
}

/* Fast Walsh-Hadamard transform in Sylvester order, `n` numbers at a time, divided by sqrt(n). `x` is padded to whole
 * vectors; if n is below 16, a vector holds several transforms. */
static void fwht(float *x, int64_t count, int64_t n)
{
    const __m512 scale = _mm512_set1_ps(1 / sqrtf((float)n));
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
        if (n > 1)
            v = butterfly(v, 1, 0xaaaa);
        if (n > 2)
            v = butterfly(v, 2, 0xcccc);
        if (n > 4)
            v = butterfly(v, 4, 0xf0f0);
        if (n > 8)
            v = butterfly(v, 8, 0xff00);
        _mm512_storeu_ps(x + i, v);
    }
    for (int64_t step = LANES; step < n; step *= 2)
        for (int64_t start = 0; start < count; start += 2 * step)
            for (int64_t i = start; i < start + step; i += LANES) {
                __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + step);
                _mm512_storeu_ps(x + i, _mm512_add_ps(a, b));
                _mm512_storeu_ps(x + i + step, _mm512_sub_ps(a, b));
            }
}

/* Quantizes `count` numbers with one scale. Writes whole vectors unless `tight`. */
static void quantize_run(const float *x, int64_t count, bool tight, int8_t *quantized, float *scale, int32_t *sum)
{
    const __m512 sign = _mm512_set1_ps(-0.f);
    __m512 largest = _mm512_setzero_ps();
    __mmask16 bad = 0;
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 v = _mm512_maskz_loadu_ps(lanes(count - i), x + i);
        bad |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        largest = _mm512_max_ps(largest, _mm512_andnot_ps(sign, v));
    }
    float whole = fmaxf(_mm512_reduce_max_ps(largest), SMALLEST);
    __m512 factor = _mm512_set1_ps(LEVELS / whole);
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 v = _mm512_maskz_loadu_ps(lanes(count - i), x + i);
        __m512 step = _mm512_mul_ps(v, factor);
        __m512i value = _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(step, step, _CMP_ORD_Q), step); /* NaN: 0 */
        total = _mm512_add_epi32(total, value);
        _mm512_mask_cvtsepi32_storeu_epi8(quantized + i, tight ? lanes(count - i) : 0xffff, value);
    }
    *scale = bad ? NAN : whole / LEVELS;
    *sum = _mm512_reduce_add_epi32(total);
}

/* Returns the row to quantize: `x` itself, or its norm and Hadamard transform in `scratch`. */
static const float *prepare_row(const RowParams *params, const float *x, const float *norm_weight, float *scratch)
{
    const int64_t count = params->inputs;
    if (params->epsilon <= 0 && params->hadamard == 0)
        return x;
    const __m512 factor = _mm512_set1_ps(params->epsilon > 0 ? inverse_rms(x, count, params->epsilon) : 1);
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(count - i), x + i), factor);
        if (norm_weight != NULL)
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(lanes(count - i), norm_weight + i));
        _mm512_storeu_ps(scratch + i, v);
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

void quantize_row(const RowParams *params, const float *x, const float *norm_weight, float *scratch, int8_t *quantized,
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

void quantize_row_twice(const RowParams *params, const float *x, const float *norm_weight, float *scratch,
                        int8_t *quantized, float *scales, int32_t *sums)
{
    const int64_t count = params->inputs;
    x = prepare_row(params, x, norm_weight, scratch);
    quantize_run(x, count, false, quantized, scales, sums);
    fill_up(params, quantized, whole_vectors(count));
    const __m512 scale = _mm512_set1_ps(scales[0]);
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(quantized + i))));
        _mm512_storeu_ps(scratch + i, _mm512_fnmadd_ps(value, scale, _mm512_maskz_loadu_ps(lanes(count - i), x + i)));
    }
    quantized += row_bytes(params);
    quantize_run(scratch, count, false, quantized, scales + 1, sums + 1);
    fill_up(params, quantized, whole_vectors(count));
}

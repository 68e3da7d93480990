#include "vectors.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "rows.h"

#define LEVELS 127.f
#define SMALLEST 1e-10f /* a row's largest magnitude counts as this much at least */

/* 1 / root of the mean square, as in Zhang and Sennrich, Root Mean Square Layer Normalization (2019). */
static float inverse_rms(const float *x, int64_t count, float epsilon)
{
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 v = _mm512_maskz_loadu_ps(lanes(count - i), x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1 / sqrtf(_mm512_reduce_add_ps(sum) / (float)count + epsilon);
}

/* One stage within vectors: pairs that are `step` lanes apart become their sum and their difference. */
INLINE __m512 butterfly(__m512 v, int step, __mmask16 upper)
{
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(step)), v);
    return _mm512_mask_sub_ps(_mm512_add_ps(v, other), upper, other, v);
}

/* The fast Walsh-Hadamard transform in the order of Sylvester's matrix, of `n` numbers at a time, / sqrt(n).
 * `x` has room for whole vectors; where n is below 16 a vector holds several runs.
 */
static void mix(float *x, int64_t count, int64_t n)
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

/* Round `count` numbers with one scale; whole vectors are written unless `tight`. */
static void round_run(const float *x, int64_t count, bool tight, int8_t *codes, float *scale, int32_t *sum)
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
        __m512i code = _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(step, step, _CMP_ORD_Q), step); /* NaN: 0 */
        total = _mm512_add_epi32(total, code);
        _mm512_mask_cvtsepi32_storeu_epi8(codes + i, tight ? lanes(count - i) : 0xffff, code);
    }
    *scale = bad ? NAN : whole / LEVELS;
    *sum = _mm512_reduce_add_epi32(total);
}

/* The row as it is to be rounded: `x` itself, or what a norm and a Hadamard matrix make of it in `room`. */
static const float *prepare_row(const RowForm *form, const float *x, const float *gain, float *room)
{
    const int64_t count = form->inputs;
    if (form->epsilon <= 0 && form->hadamard == 0)
        return x;
    const __m512 factor = _mm512_set1_ps(form->epsilon > 0 ? inverse_rms(x, count, form->epsilon) : 1);
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(count - i), x + i), factor);
        if (gain != NULL)
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(lanes(count - i), gain + i));
        _mm512_storeu_ps(room + i, v);
    }
    if (form->hadamard > 0)
        mix(room, count, form->hadamard);
    return room;
}

/* Zeros behind `count` codes. */
static void fill_up(const RowForm *form, int8_t *codes, int64_t count)
{
    memset(codes + count, 0, (size_t)(code_bytes(form) - count));
}

static int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

void round_row(const RowForm *form, const float *x, const float *gain, float *room, int8_t *codes, float *scales, int32_t *sums)
{
    const int64_t count = form->inputs, block = form->block;
    x = prepare_row(form, x, gain, room);
    if (block == 0)
        round_run(x, count, false, codes, scales, sums);
    else
        for (int64_t b = 0; b < count / block; b++)
            round_run(x + b * block, block, true, codes + b * block, scales + b, sums + b);
    fill_up(form, codes, block ? count : whole_vectors(count));
}

void round_row_twice(const RowForm *form, const float *x, const float *gain, float *room, int8_t *codes, float *scales, int32_t *sums)
{
    const int64_t count = form->inputs;
    x = prepare_row(form, x, gain, room);
    round_run(x, count, false, codes, scales, sums);
    fill_up(form, codes, whole_vectors(count));
    const __m512 scale = _mm512_set1_ps(scales[0]);
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + i))));
        _mm512_storeu_ps(room + i, _mm512_fnmadd_ps(code, scale, _mm512_maskz_loadu_ps(lanes(count - i), x + i)));
    }
    codes += code_bytes(form);
    round_run(room, count, false, codes, scales + 1, sums + 1);
    fill_up(form, codes, whole_vectors(count));
}

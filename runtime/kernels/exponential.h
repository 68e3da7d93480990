/* Powers of two and tanh of 16 floats, for the softmax. */
#ifndef SATCHEL_EXPONENTIAL_H
#define SATCHEL_EXPONENTIAL_H

#include "vectors.h"

/* 2^r - 1 for r in [0, 1): r times a polynomial fitted to (2^r - 1) / r, error below 2e-9 of 2^r before rounding. */
INLINE __m512 exp2_fraction_less_one(__m512 r)
{
    __m512 p = _mm512_set1_ps(0x1.c5414cp-13f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.46d65cp-10f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.3d0b90p-7f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c68912p-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebfd58p-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e42cp-1f));
    return _mm512_mul_ps(p, r);
}

/* 2^x, 1 for 0 exactly, 0 below 2^-126; relative error below 1.5e-7. */
INLINE __m512 exp2_lanes(__m512 x)
{
    __m512 r = _mm512_reduce_ps(x, 0x01 | 0x08); /* x - floor(x) */
    __m512 p = _mm512_add_ps(exp2_fraction_less_one(r), _mm512_set1_ps(1.0f));
    __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(kept, p, x);
}

/* tanh(y) = e / (e + 2) with e = exp(2|y|) - 1, and the sign of y; near 0 no digits are lost, as e is no difference. */
INLINE __m512 tanh_lanes(__m512 y)
{
    __m512 twice = _mm512_mul_ps(_mm512_abs_ps(y), _mm512_set1_ps(0x1.715476p+1f)); /* 2 / ln 2 */
    __m512 x = _mm512_min_ps(_mm512_set1_ps(40.0f), twice); /* a NaN stays one: the second operand is returned */
    __m512 one = _mm512_set1_ps(1.0f), r = _mm512_reduce_ps(x, 0x01 | 0x08);
    __m512 whole = _mm512_sub_ps(_mm512_scalef_ps(one, x), one);
    __m512 e = _mm512_add_ps(_mm512_scalef_ps(exp2_fraction_less_one(r), x), whole);
    __m512 magnitude = _mm512_div_ps(e, _mm512_add_ps(e, _mm512_set1_ps(2.0f)));
    __m512 sign = _mm512_and_ps(y, _mm512_set1_ps(-0.0f));
    return _mm512_or_ps(magnitude, sign);
}

#endif

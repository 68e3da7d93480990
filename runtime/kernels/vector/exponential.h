/* Powers of two and tanh of 16 floats, for the softmax and the gates. */
#ifndef SATCHEL_EXPONENTIAL_H
#define SATCHEL_EXPONENTIAL_H

#include "vectors.h"

/* p * 2^floor(x) for x from -126 on; infinite where that is too large, NaN where p is. */
INLINE F16 times_power(F16 p, F16 x)
{
#ifdef part_times_power
    EACH_PART p.part[i] = part_times_power(p.part[i], x.part[i]);
    return p;
#else
    /* Two factors, as one of 2^128 is no float. A NaN becomes a number here, and stays one in p. */
    const F16 most = floats(127), whole = larger(smaller(floor_of(x), floats(254)), floats(-126));
    const F16 low = smaller(whole, most), high = sub(whole, low);
    return mul(mul(p, power_of(low)), power_of(high));
#endif
}

/* 2^r - 1 for r in [0, 1): r times a polynomial fitted to (2^r - 1) / r, error below 2e-9 of 2^r before rounding. */
INLINE F16 exp2_fraction_less_one(F16 r)
{
    F16 p = floats(0x1.c5414cp-13f);
    p = mul_add(p, r, floats(0x1.46d65cp-10f));
    p = mul_add(p, r, floats(0x1.3d0b90p-7f));
    p = mul_add(p, r, floats(0x1.c68912p-5f));
    p = mul_add(p, r, floats(0x1.ebfd58p-3f));
    p = mul_add(p, r, floats(0x1.62e42cp-1f));
    return mul(p, r);
}

/* 2^x, 1 for 0 exactly, 0 below 2^-126; relative error below 1.5e-7. */
INLINE F16 exp2_lanes(F16 x)
{
    const F16 bounded = smaller(floats(300), x); /* a NaN stays one; infinity has no fraction */
    F16 p = add(exp2_fraction_less_one(fraction_of(bounded)), floats(1));
    return choose(is_below(x, floats(-126)), floats(0), times_power(p, bounded));
}

/* e^x */
INLINE F16 exp_lanes(F16 x) { return exp2_lanes(mul(x, floats(1.44269504f))); }

/* x / (1 + e^-x) */
INLINE F16 silu(F16 x) { return divide(x, add(floats(1), exp2_lanes(mul(x, floats(-1.44269504f))))); }

/* tanh(y) = e / (e + 2) with e = exp(2|y|) - 1, and the sign of y; near 0 no digits are lost, as e is no difference. */
INLINE F16 tanh_lanes(F16 y)
{
    const F16 twice = mul(magnitude(y), floats(0x1.715476p+1f)); /* 2 / ln 2 */
    const F16 x = smaller(floats(40), twice);                    /* a NaN stays one: the second operand is returned */
    const F16 one = floats(1), whole = sub(times_power(one, x), one);
    const F16 e = add(times_power(exp2_fraction_less_one(fraction_of(x)), x), whole);
    return with_sign(divide(e, add(e, floats(2))), y);
}

#endif

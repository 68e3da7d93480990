/* Activation functions of gates. */
#ifndef SATCHEL_GATES_H
#define SATCHEL_GATES_H

#include "exponential.h"
#include "../linear.h"

/* exp(-x) */
INLINE F16 exp_less(F16 x) { return exp2_lanes(mul(x, floats(-1.44269504f))); }

/* erf(x), Abramowitz and Stegun 7.1.26 (1964): within 1.5e-7. */
INLINE F16 erf_lanes(F16 x)
{
    const F16 one = floats(1), z = magnitude(x), t = divide(one, mul_add(z, floats(.3275911f), one));
    F16 p = floats(1.061405429f);
    p = mul_add(p, t, floats(-1.453152027f));
    p = mul_add(p, t, floats(1.421413741f));
    p = mul_add(p, t, floats(-.284496736f));
    p = mul_add(p, t, floats(.254829592f));
    return with_sign(mul_sub_from(mul(p, t), exp_less(mul(z, z)), one), x);
}

/* Defined as in their papers. */
INLINE F16 activate(Gate gate, F16 x)
{
    const F16 one = floats(1), half = mul(x, floats(.5f));
    if (gate == GATE_RELU)
        return larger(x, floats(0));
    if (gate == GATE_GELU)
        return mul(half, add(erf_lanes(mul(x, floats(.70710678f))), one));
    if (gate == GATE_GELU_TANH) {
        const F16 cubic = mul(mul(x, x), mul(x, floats(.044715f)));
        return mul(half, add(tanh_lanes(mul(add(x, cubic), floats(.79788456f))), one));
    }
    return divide(x, add(one, exp_less(x)));
}

#endif

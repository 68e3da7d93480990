/* For kernels that are not yet written over vectors.h. */
#include "exponential.h"

INLINE __m512 native_exp2(__m512 x) { return exp2_lanes((F16){{x}}).part[0]; }
INLINE __m512 native_tanh(__m512 x) { return tanh_lanes((F16){{x}}).part[0]; }
#define exp2_lanes native_exp2
#define tanh_lanes native_tanh
INLINE __mmask64 bytes(int64_t left) { return left >= BYTES ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1; }

/* sum += the products of 4 unsigned bytes of each lane with 4 signed ones. By hand, since GCC 12 copies each sum around
 * its own form of the instruction and runs out of registers. */
#define ADD_DOT(sum, weights, activation) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(activation))

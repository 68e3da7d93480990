/* AVX-512 helpers. Include this before anything else in a file whose functions need them. */
#ifndef SATCHEL_VECTORS_H
#define SATCHEL_VECTORS_H

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")

#include <immintrin.h>
#include <stdint.h>

enum { LANES = 16, BYTES = 64 };

/* Loops of a fixed few rounds, unrolled before the compiler decides what lives in registers. */
#define UNROLL _Pragma("GCC unroll 8")

#define INLINE static inline __attribute__((always_inline))

/* The first `left` lanes, all where there are more. */
INLINE __mmask16 lanes(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1); }
INLINE __mmask64 bytes(int64_t left) { return left >= BYTES ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1; }

/* sum += the products of 4 unsigned bytes of each lane with 4 signed ones. By hand, since GCC 12 copies each sum around
 * its own form of the instruction and runs out of registers.
 */
#define ADD_DOT(sum, weights, activation) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(activation))

/* exp(x) to 2 units in the last place: x = n ln 2 + r, exp(r) by its Taylor series on |r| <= ln 2 / 2. */
INLINE __m512 exp16(__m512 x)
{
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.7f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, n);
}

#endif

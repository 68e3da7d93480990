/* AVX-512 helpers. Include this before anything else in a file whose functions need them. */
#ifndef SATCHEL_VECTORS_H
#define SATCHEL_VECTORS_H

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")

#include <immintrin.h>
#include <stdint.h>

enum { LANES = 16, BYTES = 64 };

/* For short loops of constant length: unrolled before register allocation. */
#define UNROLL _Pragma("GCC unroll 8")

#define INLINE static inline __attribute__((always_inline))

/* A mask of the first `left` lanes, at most all. */
INLINE __mmask16 lanes(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1); }
INLINE __mmask64 bytes(int64_t left) { return left >= BYTES ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1; }

/* sum += the products of 4 unsigned bytes of each lane with 4 signed ones. By hand, since GCC 12 copies each sum around
 * its own params of the instruction and runs out of registers.
 */
#define ADD_DOT(sum, weights, activation) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(activation))

#endif

/* Vectors of 16 floats or integers on any processor. Each is a struct of PARTS native vectors, which compilers keep in
 * registers; the file of an instruction set (isa/) has the types and what C has no operator for. All of them give the
 * same bits: sums of lanes are added in one order, and a * b + c is rounded once where it is written `mul_add`.
 *
 * Include this before anything else in a file whose functions need it. */
#ifndef SATCHEL_VECTORS_H
#define SATCHEL_VECTORS_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* UNROLL is for short loops of constant length: unrolled before register allocation. Plain C need not be fast: with these
 * two it takes minutes to compile, and four times the space. */
#if defined(SATCHEL_ISA_PLAIN)
#define INLINE static inline
#define UNROLL
#else
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#endif

enum { LANES = 16, BYTES = 64 };

/* TARGET("features") compiles what follows, up to END_TARGET, for these features. */
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define TARGET(features) PRAGMA(GCC target(features))
#define END_TARGET
#endif

typedef int32_t Four __attribute__((vector_size(16)));
#if defined(__clang__) || __GNUC__ >= 12
#define FOUR_OF(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FOUR_OF(a, b, ...) __builtin_shuffle(a, b, (Four){__VA_ARGS__})
#endif

#if defined(SATCHEL_ISA_AVX512)
#include "../isa/avx512.h"
#elif defined(SATCHEL_ISA_AVX2) || defined(SATCHEL_ISA_AVXVNNI)
#include "../isa/avx2.h"
#elif defined(SATCHEL_ISA_NEON) || defined(SATCHEL_ISA_I8MM)
#include "../isa/neon.h"
#else
#include "../isa/plain.h"
#undef END_TARGET
#define END_TARGET
#endif

/* An instruction set's TILE_VECTORS: vectors of a register tile beside 6 numbers that each is multiplied by. */
enum { PART_LANES = LANES / PARTS };

typedef struct {
    PartF part[PARTS];
} F16;
typedef struct {
    PartI part[PARTS];
} I16;

#define EACH_PART UNROLL for (int i = 0; i < PARTS; i++)

#define ON_PARTS_1(Result, name, A, expression) \
    INLINE Result name(A a)                     \
    {                                           \
        Result r;                               \
        EACH_PART r.part[i] = expression;       \
        return r;                               \
    }
#define ON_PARTS_2(Result, name, A, B, expression) \
    INLINE Result name(A a, B b)                   \
    {                                              \
        Result r;                                  \
        EACH_PART r.part[i] = expression;          \
        return r;                                  \
    }
#define ON_PARTS_3(Result, name, A, B, C, expression) \
    INLINE Result name(A a, B b, C c)                 \
    {                                                 \
        Result r;                                     \
        EACH_PART r.part[i] = expression;             \
        return r;                                     \
    }

ON_PARTS_2(F16, add, F16, F16, a.part[i] + b.part[i])
ON_PARTS_2(F16, sub, F16, F16, a.part[i] - b.part[i])
ON_PARTS_2(F16, mul, F16, F16, a.part[i] * b.part[i])
ON_PARTS_2(F16, divide, F16, F16, a.part[i] / b.part[i])
ON_PARTS_3(F16, mul_add, F16, F16, F16, part_fma(a.part[i], b.part[i], c.part[i]))     /* a * b + c */
ON_PARTS_3(F16, mul_sub_from, F16, F16, F16, part_fma(-a.part[i], b.part[i], c.part[i]))   /* c - a * b */
ON_PARTS_3(F16, mul_sub, F16, F16, F16, part_fma(a.part[i], b.part[i], -c.part[i]))        /* a * b - c */
ON_PARTS_2(F16, larger, F16, F16, part_max(a.part[i], b.part[i])) /* b where one is NaN */
ON_PARTS_2(F16, smaller, F16, F16, part_min(a.part[i], b.part[i])) /* the same */
ON_PARTS_1(F16, floor_of, F16, part_floor(a.part[i]))
ON_PARTS_1(I16, nearest, F16, part_nearest(a.part[i])) /* to even; for magnitudes below 2^31 */
ON_PARTS_1(F16, to_floats, I16, __builtin_convertvector(a.part[i], PartF))
ON_PARTS_2(I16, add_ints, I16, I16, a.part[i] + b.part[i])
ON_PARTS_2(I16, sub_ints, I16, I16, a.part[i] - b.part[i])
ON_PARTS_2(I16, mul_ints, I16, I16, a.part[i] * b.part[i])
ON_PARTS_1(F16, bits_to_floats, I16, (PartF)a.part[i])
ON_PARTS_1(I16, bits_of, F16, (PartI)a.part[i])
ON_PARTS_2(I16, larger_int, I16, I16, part_max_int(a.part[i], b.part[i]))
ON_PARTS_2(I16, both, I16, I16, a.part[i] & b.part[i])
ON_PARTS_2(I16, either, I16, I16, a.part[i] | b.part[i])
ON_PARTS_2(I16, is_below, F16, F16, (PartI)(a.part[i] < b.part[i])) /* all bits set, or none; a NaN is not */
ON_PARTS_2(I16, is_less, I16, I16, (PartI)(a.part[i] < b.part[i]))
ON_PARTS_2(I16, is_equal, F16, F16, (PartI)(a.part[i] == b.part[i]))
ON_PARTS_3(F16, choose, I16, F16, F16, (PartF)((a.part[i] & (PartI)b.part[i]) | (~a.part[i] & (PartI)c.part[i])))

INLINE F16 floats(float x)
{
    F16 r;
    EACH_PART r.part[i] = x - (PartF){0};
    return r;
}

INLINE I16 ints(int32_t x)
{
    I16 r;
    EACH_PART r.part[i] = x - (PartI){0};
    return r;
}

INLINE F16 load(const float *x)
{
    F16 r;
    EACH_PART memcpy(&r.part[i], x + i * PART_LANES, sizeof r.part[i]);
    return r;
}

/* Part by part: compilers keep in memory what is copied as a whole. */
INLINE void store(float *x, F16 v)
{
    EACH_PART memcpy(x + i * PART_LANES, &v.part[i], sizeof v.part[i]);
}

INLINE I16 load_ints(const int32_t *x)
{
    I16 r;
    EACH_PART memcpy(&r.part[i], x + i * PART_LANES, sizeof r.part[i]);
    return r;
}

/* The same, in registers for all that use it: GCC 12 may load a vector again for each. */
INLINE F16 load_once(const float *x)
{
    F16 r = load(x);
#ifdef PART_REGISTER
    EACH_PART __asm__("" : "+" PART_REGISTER(r.part[i]));
#endif
    return r;
}

/* The first `left` floats, at most 16, and zeros. */
INLINE F16 load_some(const float *x, int64_t left)
{
    F16 r;
    EACH_PART r.part[i] = part_load_some(x + i * PART_LANES, left - i * PART_LANES);
    return r;
}

INLINE void store_some(float *x, int64_t left, F16 v)
{
    EACH_PART part_store_some(x + i * PART_LANES, left - i * PART_LANES, v.part[i]);
}

/* The same for loops whose last step is partial: all 16 if `whole`. */
INLINE F16 load_up_to(const bool whole, const float *x, int64_t left) { return whole ? load(x) : load_some(x, left); }

INLINE void store_up_to(const bool whole, float *x, int64_t left, F16 v)
{
    if (whole)
        store(x, v);
    else
        store_some(x, left, v);
}

/* 16 bytes to integers. */
INLINE I16 load_signed(const int8_t *x)
{
    I16 r;
    EACH_PART r.part[i] = part_load_signed(x + i * PART_LANES);
    return r;
}

/* The first `left` bytes, at most 16, and zeros. */
INLINE I16 load_signed_some(const int8_t *x, int64_t left)
{
    int8_t some[LANES] = {0};
    memcpy(some, x, (size_t)(left < LANES ? left : LANES));
    return load_signed(some);
}

INLINE I16 load_unsigned(const uint8_t *x)
{
    I16 r;
    EACH_PART r.part[i] = part_load_unsigned(x + i * PART_LANES);
    return r;
}

/* 16 numbers of half precision, exactly. */
INLINE F16 load_halves(const uint16_t *x)
{
    F16 r;
    EACH_PART r.part[i] = part_load_halves(x + i * PART_LANES);
    return r;
}

/* The first `left` of them, at most 16, and zeros. */
INLINE F16 load_some_halves(const uint16_t *x, int64_t left)
{
    uint16_t some[LANES] = {0};
    memcpy(some, x, (size_t)(left < LANES ? left : LANES) * sizeof *x);
    return load_halves(some);
}

/* Numbers to half precision, the nearest or even, the first `left` of them. */
INLINE void store_halves(uint16_t *x, F16 v, int64_t left)
{
    uint16_t some[LANES];
    uint16_t *to = left < LANES ? some : x;
    EACH_PART part_store_halves(to + i * PART_LANES, v.part[i]);
    if (left < LANES)
        memcpy(x, some, (size_t)left * sizeof *x);
}

/* Integers within -128 and 127 to bytes, the first `left` of them. */
INLINE void store_bytes(int8_t *x, I16 v, int64_t left)
{
    int8_t some[LANES];
    int8_t *to = left < LANES ? some : x;
    EACH_PART part_store_bytes(to + i * PART_LANES, v.part[i]);
    if (left < LANES)
        memcpy(x, some, (size_t)left);
}

/* Lane i is added to lane i + 8, then i + 4, i + 2 and i + 1. */
#define FOLD(name, Vector, Number, fold, last) \
    INLINE Number name(Vector v)               \
    {                                          \
        UNROLL                                 \
        for (int n = PARTS / 2; n > 0; n /= 2) \
            UNROLL                             \
            for (int i = 0; i < n; i++)        \
                v.part[i] = fold(v.part[i], v.part[i + n]); \
        return last(v.part[0]);                \
    }
#define PLUS(a, b) ((a) + (b))
FOLD(sum_of, F16, float, PLUS, part_sum)
FOLD(largest_of, F16, float, part_max, part_largest)

FOLD(sum_of_ints, I16, int32_t, PLUS, part_sum_ints)

INLINE float first_of(F16 v) { return v.part[0][0]; }

INLINE bool all_of(I16 mask)
{
    return sum_of_ints(mask) == -LANES;
}

/* Lanes 1, 2, 4 or 8 apart, exchanged. */
#define SWAP(step)                                                        \
    INLINE F16 swap_##step(F16 v)                                         \
    {                                                                     \
        F16 r;                                                            \
        if (step >= PART_LANES)                                           \
            EACH_PART r.part[i] = v.part[(i ^ step / PART_LANES) % PARTS];\
        else                                                              \
            EACH_PART r.part[i] = part_swap_##step(v.part[i]);            \
        return r;                                                         \
    }
SWAP(1)
SWAP(2)
SWAP(4)
SWAP(8)

/* a0 b0 a1 b1 .. a7 b7 */
INLINE F16 zip_low(F16 a, F16 b)
{
    F16 r;
    EACH_PART
        r.part[i] = i % 2 ? part_zip_high(a.part[i / 2], b.part[i / 2]) : part_zip_low(a.part[i / 2], b.part[i / 2]);
    return r;
}

/* a8 b8 a9 b9 .. a15 b15 */
INLINE F16 zip_high(F16 a, F16 b)
{
    F16 r;
    EACH_PART {
        const int from = (PARTS + i) / 2;
        r.part[i] = (PARTS + i) % 2 ? part_zip_high(a.part[from], b.part[from]) : part_zip_low(a.part[from], b.part[from]);
    }
    return r;
}

#ifndef part_sums
/* Lane i is the sum of the lanes of v[i], in the order of FOLD. */
INLINE PartF part_sums(const PartF v[PART_LANES])
{
    PartF sum[PART_LANES];
    UNROLL
    for (int i = 0; i < PART_LANES; i++)
        sum[i] = v[i];
    UNROLL
    for (int n = PART_LANES / 2; n > 0; n /= 2)
        UNROLL
        for (int i = 0; i < n; i++)
            sum[i] = part_zip_low(sum[i], sum[i + n]) + part_zip_high(sum[i], sum[i + n]);
    return sum[0];
}
#endif

/* Lane i is sum_of(v[i]). */
INLINE F16 sums_of(const F16 v[LANES])
{
    F16 r;
    EACH_PART {
        PartF folded[PART_LANES];
        UNROLL
        for (int k = 0; k < PART_LANES; k++) {
            F16 x = v[i * PART_LANES + k];
            UNROLL
            for (int n = PARTS / 2; n > 0; n /= 2)
                UNROLL
                for (int j = 0; j < n; j++)
                    x.part[j] += x.part[j + n];
            folded[k] = x.part[0];
        }
        r.part[i] = part_sums(folded);
    }
    return r;
}

/* Rows to columns. */
INLINE void transpose(F16 v[LANES])
{
    UNROLL
    for (int round = 0; round < 4; round++) {
        F16 w[LANES];
        UNROLL
        for (int i = 0; i < LANES / 2; i++) {
            w[2 * i] = zip_low(v[i], v[i + LANES / 2]);
            w[2 * i + 1] = zip_high(v[i], v[i + LANES / 2]);
        }
        UNROLL
        for (int i = 0; i < LANES; i++)
            v[i] = w[i];
    }
}

/* The largest of magnitudes as integers, which have the order of floats, and NaN if there is one. */
INLINE float largest_of_magnitudes(I16 v)
{
    const F16 each = bits_to_floats(v);
    return all_of(is_equal(each, each)) ? largest_of(each) : NAN;
}

INLINE F16 magnitude(F16 v) { return bits_to_floats(both(bits_of(v), ints(0x7fffffff))); }

/* 0 in the lanes in which `mask` has no bits; it has all or none. */
INLINE F16 only_where(I16 mask, F16 v) { return bits_to_floats(both(mask, bits_of(v))); }

/* The sign changed in the lanes in which `mask` is not 0. */
INLINE F16 flip_where(I16 mask, F16 v)
{
    EACH_PART v.part[i] = (PartF)((PartI)v.part[i] ^ ((PartI)(mask.part[i] != 0) & (int32_t)0x80000000));
    return v;
}

INLINE F16 with_sign(F16 v, F16 of)
{
    return bits_to_floats(either(bits_of(v), both(bits_of(of), ints((int32_t)0x80000000))));
}

/* v - floor(v) */
INLINE F16 fraction_of(F16 v) { return sub(v, floor_of(v)); }

/* 2^n for whole n within -126 and 127. */
INLINE F16 power_of(F16 n)
{
    I16 exponent = nearest(add(n, floats(127)));
    EACH_PART exponent.part[i] <<= 23;
    return bits_to_floats(exponent);
}

INLINE I16 lane_numbers(void)
{
    static const int32_t LANE[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_ints(LANE);
}

/* All bits set in the lanes below `left`. */
INLINE I16 lanes_below(int64_t left)
{
    const I16 lane = lane_numbers(), end = ints(left > LANES ? LANES : (int32_t)left);
    I16 r;
    EACH_PART r.part[i] = (PartI)(lane.part[i] < end.part[i]);
    return r;
}

#endif

/* Plain C: a vector is four of the compiler's own, right on any processor. */
#include <math.h>

enum { PARTS = 4 };
#define TILE_VECTORS 1
typedef float PartF __attribute__((vector_size(16)));
typedef int32_t PartI __attribute__((vector_size(16)));

#define EACH_LANE(expression)   \
    PartF r;                    \
    UNROLL                      \
    for (int j = 0; j < 4; j++) \
        r[j] = expression;      \
    return r

INLINE PartF part_fma(PartF a, PartF b, PartF c) { EACH_LANE(fmaf(a[j], b[j], c[j])); }
INLINE PartF part_max(PartF a, PartF b) { EACH_LANE(a[j] > b[j] ? a[j] : b[j]); }
INLINE PartF part_min(PartF a, PartF b) { EACH_LANE(a[j] < b[j] ? a[j] : b[j]); }
INLINE PartF part_floor(PartF a) { EACH_LANE(floorf(a[j])); }

INLINE PartI part_max_int(PartI a, PartI b)
{
    const PartI larger = a > b;
    return (a & larger) | (b & ~larger);
}

INLINE PartI part_nearest(PartF a)
{
    PartI r;
    for (int j = 0; j < 4; j++)
        r[j] = (int32_t)rintf(a[j]);
    return r;
}

INLINE PartF part_load_some(const float *x, int64_t left) { EACH_LANE(j < left ? x[j] : 0); }

INLINE void part_store_some(float *x, int64_t left, PartF v)
{
    for (int64_t j = 0; j < 4 && j < left; j++)
        x[j] = v[j];
}

INLINE PartI part_load_signed(const int8_t *x) { return (PartI){x[0], x[1], x[2], x[3]}; }
INLINE PartI part_load_unsigned(const uint8_t *x) { return (PartI){x[0], x[1], x[2], x[3]}; }

/* The exponent and the fraction are shifted to their places, and the exponent's bias is raised by a product, which is right
 * for subnormal numbers too. */
INLINE PartF part_load_halves(const uint16_t *x)
{
    PartF r;
    UNROLL
    for (int j = 0; j < 4; j++) {
        const uint32_t size = x[j] & 0x7fffu;
        uint32_t bits = size << 13;
        float number;
        memcpy(&number, &bits, sizeof number);
        number *= 0x1p112f;
        memcpy(&bits, &number, sizeof bits);
        bits |= (x[j] & 0x8000u) << 16 | (size >= 0x7c00 ? 0x7f800000 : 0); /* infinity, or no number */
        memcpy(&number, &bits, sizeof number);
        r[j] = number;
    }
    return r;
}

/* The other way: a normal number's fraction loses its last 13 bits, half of the last one added, or one less where what is
 * kept is even; a subnormal's is aligned by a sum with a power of two, which rounds. */
INLINE void part_store_halves(uint16_t *x, PartF v)
{
    for (int j = 0; j < 4; j++) {
        const float number = v[j], size = fabsf(number), aligned = size + 0.5f;
        uint32_t bits, sign, small;
        memcpy(&sign, &number, sizeof sign);
        memcpy(&bits, &size, sizeof bits);
        memcpy(&small, &aligned, sizeof small);
        if (size != size)
            bits = 0x7e00;
        else if (size < 0x1p-14f)
            bits = small - 0x3f000000;
        else
            bits = size < 65520 ? (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13 : 0x7c00;
        x[j] = (uint16_t)((sign >> 16 & 0x8000u) | bits);
    }
}

INLINE void part_store_bytes(int8_t *x, PartI v)
{
    for (int j = 0; j < 4; j++)
        x[j] = (int8_t)v[j];
}

INLINE Four part_sum_fours(PartI v) { return (Four)v; } /* of the groups of four lanes */
INLINE int32_t part_sum_ints(PartI v) { return v[0] + v[1] + v[2] + v[3]; }
INLINE float part_sum(PartF v) { return (v[0] + v[2]) + (v[1] + v[3]); }

INLINE float part_largest(PartF v)
{
    float most = v[0];
    for (int i = 1; i < 4; i++)
        most = most > v[i] ? most : v[i];
    return most;
}

INLINE PartF part_swap_1(PartF v) { return (PartF){v[1], v[0], v[3], v[2]}; }
INLINE PartF part_swap_2(PartF v) { return (PartF){v[2], v[3], v[0], v[1]}; }
INLINE PartF part_swap_4(PartF v) { return v; } /* not within a part */
INLINE PartF part_swap_8(PartF v) { return v; }
INLINE PartF part_zip_low(PartF a, PartF b) { return (PartF){a[0], b[0], a[1], b[1]}; }
INLINE PartF part_zip_high(PartF a, PartF b) { return (PartF){a[2], b[2], a[3], b[3]}; }

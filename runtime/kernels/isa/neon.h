/* Arm's vectors of 128 bits, with dot products and perhaps matrix products: a vector is four registers. */
#include <arm_neon.h>

#if defined(__clang__) && defined(SATCHEL_ISA_I8MM)
TARGET("dotprod,i8mm")
#elif defined(__clang__)
TARGET("dotprod")
#elif defined(SATCHEL_ISA_I8MM)
TARGET("+dotprod+i8mm")
#else
TARGET("+dotprod")
#endif

enum { PARTS = 4 };
#define TILE_VECTORS 1
#define PART_REGISTER "w"
typedef float32x4_t PartF;
typedef int32x4_t PartI;

INLINE PartF part_fma(PartF a, PartF b, PartF c) { return vfmaq_f32(c, a, b); }
INLINE PartF part_max(PartF a, PartF b) { return vbslq_f32(vcgtq_f32(a, b), a, b); } /* vmaxq returns a NaN */
INLINE PartI part_max_int(PartI a, PartI b) { return vmaxq_s32(a, b); }
INLINE PartF part_min(PartF a, PartF b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE PartF part_floor(PartF a) { return vrndmq_f32(a); }
INLINE PartI part_nearest(PartF a) { return vcvtnq_s32_f32(a); }

INLINE PartF part_load_some(const float *x, int64_t left)
{
    float some[4] = {0};
    if (left >= 4)
        return vld1q_f32(x);
    for (int64_t i = 0; i < left; i++)
        some[i] = x[i];
    return vld1q_f32(some);
}

INLINE void part_store_some(float *x, int64_t left, PartF v)
{
    if (left >= 4)
        vst1q_f32(x, v);
    else
        for (int64_t i = 0; i < left; i++)
            x[i] = v[i];
}

INLINE PartI part_load_signed(const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, sizeof four);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}

INLINE PartI part_load_unsigned(const uint8_t *x)
{
    uint32_t four;
    memcpy(&four, x, sizeof four);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))));
}

INLINE PartF part_load_halves(const uint16_t *x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
INLINE void part_store_halves(uint16_t *x, PartF v) { vst1_u16(x, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

INLINE void part_store_bytes(int8_t *x, PartI v)
{
    int16x4_t words = vmovn_s32(v);
    int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    memcpy(x, &bytes, 4);
}

INLINE Four part_sum_fours(PartI v) { return (Four)v; } /* of the groups of four lanes */
INLINE int32_t part_sum_ints(PartI v) { return vaddvq_s32(v); }
INLINE float part_sum(PartF v)
{
    float32x2_t two = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

INLINE float part_largest(PartF v)
{
    float most = v[0];
    for (int i = 1; i < 4; i++)
        most = most > v[i] ? most : v[i];
    return most;
}

INLINE PartF part_swap_1(PartF v) { return vrev64q_f32(v); }
INLINE PartF part_swap_2(PartF v) { return vextq_f32(v, v, 2); }
INLINE PartF part_swap_4(PartF v) { return v; } /* not within a register */
INLINE PartF part_swap_8(PartF v) { return v; }
INLINE PartF part_zip_low(PartF a, PartF b) { return vzip1q_f32(a, b); }
INLINE PartF part_zip_high(PartF a, PartF b) { return vzip2q_f32(a, b); }

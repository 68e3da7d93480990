/* AVX-512 with VNNI: a vector is one register. */
#include <immintrin.h>

TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")

enum { PARTS = 1 };
#define TILE_VECTORS 4
#define PART_REGISTER "v"
typedef float PartF __attribute__((vector_size(64)));
typedef int32_t PartI __attribute__((vector_size(64)));

INLINE __mmask16 lanes(int64_t left)
{
    left = left < 0 ? 0 : left;
    return (__mmask16)((1u << (left < LANES ? left : LANES)) - 1); /* without a branch, so that it leaves loops */
}

INLINE PartF part_fma(PartF a, PartF b, PartF c) { return _mm512_fmadd_ps(a, b, c); }
INLINE PartF part_max(PartF a, PartF b) { return _mm512_max_ps(a, b); }
INLINE PartI part_max_int(PartI a, PartI b) { return (PartI)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE PartF part_min(PartF a, PartF b) { return _mm512_min_ps(a, b); }
INLINE PartF part_floor(PartF a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE PartI part_nearest(PartF a) { return (PartI)_mm512_cvtps_epi32(a); }
INLINE PartF part_load_some(const float *x, int64_t left) { return _mm512_maskz_loadu_ps(lanes(left), x); }
INLINE void part_store_some(float *x, int64_t left, PartF v) { _mm512_mask_storeu_ps(x, lanes(left), v); }
INLINE PartI part_load_signed(const int8_t *x) { return (PartI)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)); }
INLINE PartI part_load_unsigned(const uint8_t *x) { return (PartI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x)); }
INLINE PartF part_load_halves(const uint16_t *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)); }
INLINE void part_store_halves(uint16_t *x, PartF v) { _mm256_storeu_si256((__m256i *)x, _mm512_cvtps_ph(v, 0)); }
INLINE void part_store_bytes(int8_t *x, PartI v) { _mm_storeu_si128((__m128i *)x, _mm512_cvtepi32_epi8((__m512i)v)); }
/* Of the groups of four lanes. */
INLINE Four part_sum_fours(PartI v)
{
    const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256((__m512i)v), _mm512_extracti64x4_epi64((__m512i)v, 1));
    return (Four)_mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
}
INLINE int32_t part_sum_ints(PartI v) { return _mm512_reduce_add_epi32((__m512i)v); }
INLINE float part_sum(PartF v) { return _mm512_reduce_add_ps(v); }
INLINE float part_largest(PartF v) { return _mm512_reduce_max_ps(v); }

INLINE PartF part_swap_1(PartF v) { return _mm512_permute_ps(v, 0xb1); }
INLINE PartF part_swap_2(PartF v) { return _mm512_permute_ps(v, 0x4e); }
INLINE PartF part_swap_4(PartF v) { return _mm512_shuffle_f32x4(v, v, 0xb1); }
INLINE PartF part_swap_8(PartF v) { return _mm512_shuffle_f32x4(v, v, 0x4e); }
#define part_times_power(p, x) ((PartF)_mm512_scalef_ps(p, x))

INLINE PartF part_zip_low(PartF a, PartF b)
{
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}

INLINE PartF part_zip_high(PartF a, PartF b)
{
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}

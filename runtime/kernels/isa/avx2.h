/* AVX2: a vector is two registers. */
#include <immintrin.h>

#ifdef SATCHEL_ISA_AVXVNNI
TARGET("avx2,fma,f16c,avxvnni")
#else
TARGET("avx2,fma,f16c")
#endif

enum { PARTS = 2 };
#define TILE_VECTORS 1
#define PART_REGISTER "x"
typedef float PartF __attribute__((vector_size(32)));
typedef int32_t PartI __attribute__((vector_size(32)));

/* All bits set in the lanes below `left`. */
INLINE __m256i lanes(int64_t left)
{
    const __m256i end = _mm256_set1_epi32(left > 8 ? 8 : left < 0 ? 0 : (int)left);
    return _mm256_cmpgt_epi32(end, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE PartF part_fma(PartF a, PartF b, PartF c) { return _mm256_fmadd_ps(a, b, c); }
INLINE PartF part_max(PartF a, PartF b) { return _mm256_max_ps(a, b); }
INLINE PartI part_max_int(PartI a, PartI b) { return (PartI)_mm256_max_epi32((__m256i)a, (__m256i)b); }
INLINE PartF part_min(PartF a, PartF b) { return _mm256_min_ps(a, b); }
INLINE PartF part_floor(PartF a) { return _mm256_floor_ps(a); }
INLINE PartI part_nearest(PartF a) { return (PartI)_mm256_cvtps_epi32(a); }
INLINE PartF part_load_some(const float *x, int64_t left) { return _mm256_maskload_ps(x, lanes(left)); }
INLINE void part_store_some(float *x, int64_t left, PartF v) { _mm256_maskstore_ps(x, lanes(left), v); }
INLINE PartI part_load_signed(const int8_t *x) { return (PartI)_mm256_cvtepi8_epi32(_mm_loadu_si64(x)); }
INLINE PartI part_load_unsigned(const uint8_t *x) { return (PartI)_mm256_cvtepu8_epi32(_mm_loadu_si64(x)); }
INLINE PartF part_load_halves(const uint16_t *x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)); }
INLINE void part_store_halves(uint16_t *x, PartF v) { _mm_storeu_si128((__m128i *)x, _mm256_cvtps_ph(v, 0)); }

INLINE void part_store_bytes(int8_t *x, PartI v)
{
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storeu_si64(x, _mm_packs_epi16(words, words));
}

/* Of the groups of four lanes. */
INLINE Four part_sum_fours(PartI v)
{
    return (Four)_mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}

INLINE int32_t part_sum_ints(PartI v)
{
    __m128i four = (__m128i)part_sum_fours(v);
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

INLINE float part_sum(PartF v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float part_largest(PartF v)
{
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE PartF part_swap_1(PartF v) { return _mm256_permute_ps(v, 0xb1); }
INLINE PartF part_swap_2(PartF v) { return _mm256_permute_ps(v, 0x4e); }
INLINE PartF part_swap_4(PartF v) { return _mm256_permute2f128_ps(v, v, 1); }
INLINE PartF part_swap_8(PartF v) { return v; } /* not within a register */

INLINE PartF part_zip_low(PartF a, PartF b)
{
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}

INLINE PartF part_zip_high(PartF a, PartF b)
{
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

INLINE PartF add_zipped(PartF a, PartF b) { return _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b); }

#define part_sums part_sums
/* Halves first, then within them: half the shuffles of zips. */
INLINE PartF part_sums(const PartF v[8])
{
    PartF four[4];
    for (int i = 0; i < 4; i++)
        four[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20) + _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    return add_zipped(add_zipped(four[0], four[2]), add_zipped(four[1], four[3]));
}

/* Inner products of bytes with AVX2. */
#define NARROW_INPUTS 32 /* 4-bit products of as many inputs fit 16 bits: each lane adds 32 / 2 of at most 15 * 127 */

enum {
    LESS = 128, /* what is subtracted from 8-bit weights as they are read: 2 * 128 * 127 fits 16 bits, 2 * 255 * 127 not */
    /* 8 sums, 2 weights and their magnitudes, 1 activation, 1 product and 1 constant in 16 registers. */
    TILE_ROWS = 4,
    FEWER_ROWS = 4,
    SMALL_ROWS = 2,
    CHANNEL_COLUMNS = 2,
    BLOCK_COLUMNS = 2,
    FEW_COLUMNS = 4,
};

typedef struct {
    __m256i value, magnitude;
} Weights;

INLINE Weights weights_of_8_bits(const uint8_t *x)
{
    const __m256i value = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)x), _mm256_set1_epi8((char)LESS));
    return (Weights){value, _mm256_abs_epi8(value)};
}
INLINE Weights low_4_bits(const uint8_t *x)
{
    return (Weights){.value = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)x), _mm256_set1_epi8(15))};
}
INLINE Weights high_4_bits(const uint8_t *x)
{
    const __m256i high = _mm256_srli_epi16(_mm256_loadu_si256((const __m256i *)x), 4);
    return (Weights){.value = _mm256_and_si256(high, _mm256_set1_epi8(15))};
}

INLINE PartI widened(PartI sum) { return (PartI)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }

INLINE PartI add_dot(PartI sum, Weights weights, PartI activation)
{
    const __m256i signs = _mm256_sign_epi8((__m256i)activation, weights.value);
    return sum + widened((PartI)_mm256_maddubs_epi16(weights.magnitude, signs));
}

INLINE PartI add_narrow_dot(PartI sum, Weights weights, PartI activation)
{
    return (PartI)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16(weights.value, (__m256i)activation));
}

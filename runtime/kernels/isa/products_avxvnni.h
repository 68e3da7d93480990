/* Inner products of bytes with AVX-VNNI: one instruction, of 256 bits. */
enum {
    LESS = 0, /* what is subtracted from 8-bit weights as they are read */
    /* 12 sums, 2 weights and 1 activation in 16 registers. */
    TILE_ROWS = 6,
    FEWER_ROWS = 4,
    SMALL_ROWS = 3,
    CHANNEL_COLUMNS = 2,
    BLOCK_COLUMNS = 2,
    FEW_COLUMNS = 4,
};

typedef PartI Weights;

INLINE Weights weights_of_8_bits(const uint8_t *x) { return (PartI)_mm256_loadu_si256((const __m256i *)x); }
INLINE Weights low_4_bits(const uint8_t *x)
{
    return (PartI)_mm256_and_si256(_mm256_loadu_si256((const __m256i *)x), _mm256_set1_epi8(15));
}
INLINE Weights high_4_bits(const uint8_t *x)
{
    const __m256i high = _mm256_srli_epi16(_mm256_loadu_si256((const __m256i *)x), 4);
    return (PartI)_mm256_and_si256(high, _mm256_set1_epi8(15));
}

/* By hand, as with AVX-512. Tests put AVX2's instructions in its place. */
#ifndef VPDPBUSD
#define VPDPBUSD(sum, weights, activation) \
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(activation))
#endif

INLINE PartI add_dot(PartI sum, Weights weights, PartI activation)
{
    VPDPBUSD(sum, weights, activation);
    return sum;
}

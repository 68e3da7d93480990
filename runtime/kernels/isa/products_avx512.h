/* Inner products of bytes with AVX-512 VNNI. */
#define WIDE_STRIPS

enum {
    LESS = 0, /* what is subtracted from 8-bit weights as they are read */
    /* 24 sums, 4 weights and 1 activation in 32 registers. With blocks each has one sum per block and one over all. */
    TILE_ROWS = 6,
    FEWER_ROWS = 4,
    SMALL_ROWS = 3,
    CHANNEL_COLUMNS = 4,
    BLOCK_COLUMNS = 2,
    FEW_COLUMNS = 4,
};

typedef PartI Weights;

INLINE Weights weights_of_8_bits(const uint8_t *x) { return (PartI)_mm512_loadu_si512(x); }
INLINE Weights low_4_bits(const uint8_t *x)
{
    return (PartI)_mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi8(15));
}
INLINE Weights high_4_bits(const uint8_t *x)
{
    return (PartI)_mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(x), 4), _mm512_set1_epi8(15));
}

/* By hand, since GCC 12 copies each sum around its own form of the instruction and runs out of registers. */
INLINE PartI add_dot(PartI sum, Weights weights, PartI activation)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(activation));
    return sum;
}

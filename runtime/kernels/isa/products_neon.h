/* Inner products of bytes with Arm's dot products, which are of signed bytes. */
enum {
    LESS = 128, /* what is subtracted from 8-bit weights as they are read */
    /* 24 sums, 4 weights and 1 activation in 32 registers. With blocks each has one sum per block and one over all. */
    TILE_ROWS = 6,
    FEWER_ROWS = 4,
    SMALL_ROWS = 3,
    CHANNEL_COLUMNS = 4,
    BLOCK_COLUMNS = 2,
    FEW_COLUMNS = 8,
};

typedef int8x16_t Weights;

INLINE Weights weights_of_8_bits(const uint8_t *x) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(x), vdupq_n_u8(LESS))); }
INLINE Weights low_4_bits(const uint8_t *x) { return vreinterpretq_s8_u8(vandq_u8(vld1q_u8(x), vdupq_n_u8(15))); }
INLINE Weights high_4_bits(const uint8_t *x) { return vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(x), 4)); }

INLINE PartI add_dot(PartI sum, Weights weights, PartI activation)
{
    return vdotq_s32(sum, weights, vreinterpretq_s8_s32(activation));
}

/* Inner products of bytes with Arm's matrix products (i8mm): of unsigned bytes with signed ones. */
enum {
    LESS = 0, /* what is subtracted from 8-bit weights as they are read */
    /* Of 6 rows and 4 columns: 24 sums, 3 activations, and weights of one column. */
    TILE_ROWS = 6,
    FEWER_ROWS = 4,
    SMALL_ROWS = 2,
    CHANNEL_COLUMNS = 4,
    BLOCK_COLUMNS = 2,
    FEW_COLUMNS = 8,
};

typedef uint8x16_t Weights;

INLINE Weights weights_of_8_bits(const uint8_t *x) { return vld1q_u8(x); }
INLINE Weights low_4_bits(const uint8_t *x) { return vandq_u8(vld1q_u8(x), vdupq_n_u8(15)); }
INLINE Weights high_4_bits(const uint8_t *x) { return vshrq_n_u8(vld1q_u8(x), 4); }

INLINE PartI add_dot(PartI sum, Weights weights, PartI activation)
{
    return vusdotq_s32(sum, weights, vreinterpretq_s8_s32(activation));
}

/* Products of two outputs and two rows, 8 inputs each: sums of an output are neighbors. */
#define ROW_PAIRS
typedef int8x16_t RowPair;

INLINE RowPair row_pair(const int8_t *first, const int8_t *second) { return vcombine_s8(vld1_s8(first), vld1_s8(second)); }

INLINE Weights output_pair(const int which, Weights inputs, Weights next)
{
    const uint32x4_t a = vreinterpretq_u32_u8(inputs), b = vreinterpretq_u32_u8(next);
    return vreinterpretq_u8_u32(which == 0 ? vzip1q_u32(a, b) : vzip2q_u32(a, b));
}

INLINE PartI add_pairs(PartI sum, Weights outputs, RowPair rows) { return vusmmlaq_s32(sum, outputs, rows); }

INLINE PartI row_of_pairs(const int which, PartI first, PartI second)
{
    return which == 0 ? vuzp1q_s32(first, second) : vuzp2q_s32(first, second);
}

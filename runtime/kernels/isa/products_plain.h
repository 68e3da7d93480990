/* Inner products of bytes in plain C. */
enum {
    LESS = 128, /* what is subtracted from 8-bit weights as they are read: sums of signed products fit 32 bits */
    TILE_ROWS = 2,
    FEWER_ROWS = 2,
    SMALL_ROWS = 2,
    CHANNEL_COLUMNS = 2,
    BLOCK_COLUMNS = 2,
    FEW_COLUMNS = 2,
};

typedef int8_t Weights __attribute__((vector_size(16)));
typedef uint8_t Unsigned __attribute__((vector_size(16)));

INLINE Unsigned load_unsigned_bytes(const uint8_t *x)
{
    Unsigned r;
    memcpy(&r, x, sizeof r);
    return r;
}

INLINE Weights weights_of_8_bits(const uint8_t *x) { return (Weights)(load_unsigned_bytes(x) ^ LESS); }
INLINE Weights low_4_bits(const uint8_t *x) { return (Weights)(load_unsigned_bytes(x) & 15); }
INLINE Weights high_4_bits(const uint8_t *x) { return (Weights)(load_unsigned_bytes(x) >> 4); }

INLINE PartI add_dot(PartI sum, Weights weights, PartI activation)
{
    int8_t each[16];
    memcpy(each, &activation, sizeof each);
    UNROLL
    for (int j = 0; j < 16; j++)
        sum[j / 4] += weights[j] * each[j];
    return sum;
}

/* Inner products of bytes with AVX2. */
enum {
    LESS = 0, /* what is subtracted from weights of 8 bits as they are read */
    TILE_ROWS = 6,
    FEWER_ROWS = 4,
    SMALL_ROWS = 2,
};

/* 4-bit weights: 8 sums, 2 weights, 1 activation, 1 product and 1 constant in 16 registers. 8-bit weights are widened to
 * words of 16 bits and have two sums each: 12 sums, 2 weights, 1 activation and 1 product. */
#define WORDS 1
#define NARROW_INPUTS 32 /* 4-bit products of as many inputs fit 16 bits: each lane adds 32 / 2 of at most 15 * 127 */
#define columns_at_once(bits, channel, rows) ((rows) == 1 ? 4 : (bits) == 4 ? ((rows) == 2 ? 4 : 2) : (rows) == 2 ? 2 : 1)

/* Of a column of a tile, and their sums. 8 bits: words of the first four outputs, then of the others; each output has
 * two sums, of pairs of inputs. 4 bits: bytes, whose sums have 16 bits, in the first register only. */
typedef struct {
    __m256i first, second;
} Column, Sum;

INLINE Column low_column(const int bits, const uint8_t *x)
{
    const __m128i *halves = (const __m128i *)x;
    if (bits == 4)
        return (Column){.first = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)x), _mm256_set1_epi8(15))};
    return (Column){_mm256_cvtepu8_epi16(_mm_loadu_si128(halves)), _mm256_cvtepu8_epi16(_mm_loadu_si128(halves + 1))};
}
INLINE Column high_column(const uint8_t *x)
{
    const __m256i high = _mm256_srli_epi16(_mm256_loadu_si256((const __m256i *)x), 4);
    return (Column){.first = _mm256_and_si256(high, _mm256_set1_epi8(15))};
}

INLINE __m256i four_words(const int8_t *x)
{
    long long four;
    memcpy(&four, x, sizeof four);
    return _mm256_set1_epi64x(four);
}

/* Product and sum by hand, since GCC 12 computes all products of a step first and runs out of registers. */
#define MULTIPLY_ADD(multiply, add, sum, weights, activation)                                                     \
    do {                                                                                                          \
        __m256i product;                                                                                          \
        __asm__(multiply " %3, %2, %1\n\t" add " %1, %0, %0"                                                      \
                : "+x"(sum), "=&x"(product)                                                                       \
                : "x"(weights), "x"(activation));                                                                 \
    } while (0)

INLINE Sum add_products(const int bits, Sum sum, Column weights, PartI activation)
{
    if (bits == 4) {
        MULTIPLY_ADD("vpmaddubsw", "vpaddw", sum.first, weights.first, activation);
        return sum;
    }
    MULTIPLY_ADD("vpmaddwd", "vpaddd", sum.first, weights.first, activation);
    MULTIPLY_ADD("vpmaddwd", "vpaddd", sum.second, weights.second, activation);
    return sum;
}

INLINE PartI finished(const int bits, Sum sum)
{
    if (bits == 4)
        return (PartI)_mm256_madd_epi16(sum.first, _mm256_set1_epi16(1));
    return (PartI)_mm256_permute4x64_epi64(_mm256_hadd_epi32(sum.first, sum.second), 0xd8);
}

/* As many inputs of one output as a vector has bytes, and their products. */
typedef Column Run;
INLINE Run load_run(const uint8_t *x) { return low_column(8, x); }
INLINE PartI add_run(PartI sum, Run weights, const int8_t *words)
{
    const __m256i *x = (const __m256i *)words;
    sum += (PartI)_mm256_madd_epi16(weights.first, _mm256_loadu_si256(x));
    return sum + (PartI)_mm256_madd_epi16(weights.second, _mm256_loadu_si256(x + 1));
}

INLINE void store_words(int16_t *x, I16 v, int64_t left)
{
    int16_t some[LANES];
    const __m256i packed = _mm256_packs_epi32((__m256i)v.part[0], (__m256i)v.part[1]);
    const __m256i words = _mm256_permute4x64_epi64(packed, 0xd8);
    memcpy(left < LANES ? some : x, &words, sizeof words);
    if (left < LANES)
        memcpy(x, some, (size_t)left * sizeof *x);
}

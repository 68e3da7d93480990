/* Linear layers of an instruction set that this processor may lack, with its instruction replaced by those of AVX2. */
#include <immintrin.h>

/* Bytes without sign times bytes with sign, four to a sum. The largest product of pairs, 255 * 127 * 2, does not fit 16
 * bits, so the lowest bit of each weight is multiplied by itself. */
__attribute__((target("avx2"))) static inline __m256i dot(__m256i sum, __m256i weights, __m256i activations)
{
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_and_si256(weights, _mm256_set1_epi8(1));
    const __m256i half = _mm256_and_si256(_mm256_srli_epi16(weights, 1), _mm256_set1_epi8(127));
    const __m256i halves = _mm256_madd_epi16(_mm256_maddubs_epi16(half, activations), ones);
    const __m256i lowest = _mm256_madd_epi16(_mm256_maddubs_epi16(low, activations), ones);
    return _mm256_add_epi32(_mm256_add_epi32(sum, lowest), _mm256_add_epi32(halves, halves));
}

#define VPDPBUSD(sum, weights, activation) ((sum) = (PartI)dot((__m256i)(sum), (__m256i)(weights), (__m256i)(activation)))

#include "isa/avxvnni.c"
#include "scratch.c"

static void one_after_another(void *pool, size_t tasks, void (*task)(void *data, size_t index), void *data)
{
    (void)pool;
    for (size_t i = 0; i < tasks; i++)
        task(data, i);
}

/* 0 on success. Numbers are inputs, block, hadamard, outputs, bits, gate, rows, and whether rows are single tokens;
 * operands are x, weights, scales, zero points, bias, residual, norm weight and y, NULL where there is none. */
__attribute__((visibility("default"))) int run_linear(const int64_t *numbers, float epsilon, void **operands)
{
    const Parallel serial = {NULL, one_after_another};
    const LinearParams params = {.row = {numbers[0], numbers[1], epsilon, numbers[2]},
                                 .outputs = numbers[3],
                                 .bits = (int)numbers[4],
                                 .gate = (Gate)numbers[5]};
    const LinearCall call = {.rows = numbers[6],
                             .single = numbers[7] != 0,
                             .x = operands[0],
                             .weights = operands[1],
                             .scales = operands[2],
                             .zero_points = operands[3],
                             .bias = operands[4],
                             .residual = operands[5],
                             .norm_weight = operands[6],
                             .y = operands[7]};
    return avxvnni_instructions.linear(&params, &call, &serial) != NULL;
}

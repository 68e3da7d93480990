/* Linear layers of an instruction set that this processor may lack, with its instruction replaced by those of AVX2; with
 * AMX defined, those of AMX and attention, whose tiles are C here. */
#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

__attribute__((visibility("default"))) int64_t tile_products; /* so far */

#ifdef AMX
/* Tiles as Intel's manual describes them. What a processor would refuse, and shapes that were not released, end the
 * program. */
static _Thread_local struct {
    bool configured;
    struct {
        int rows, bytes;
        uint8_t row[16][64];
    } tile[8];
} amx;

__attribute__((destructor)) static void released(void)
{
    if (amx.configured)
        abort();
}

static void configure(const uint8_t *shapes)
{
    if (shapes[0] != 1 || amx.configured)
        abort();
    amx.configured = true;
    for (int t = 0; t < 8; t++) {
        amx.tile[t].rows = shapes[48 + t];
        amx.tile[t].bytes = shapes[16 + 2 * t] + 256 * shapes[17 + 2 * t];
        if (amx.tile[t].rows > 16 || amx.tile[t].bytes > 64 || amx.tile[t].bytes % 4)
            abort();
        memset(amx.tile[t].row, 0, sizeof amx.tile[t].row);
    }
}

static void move(int t, uint8_t *memory, int64_t stride, bool load)
{
    if (!amx.configured || amx.tile[t].rows == 0)
        abort();
    if (load)
        memset(amx.tile[t].row, 0, sizeof amx.tile[t].row);
    for (int r = 0; r < amx.tile[t].rows; r++)
        memcpy(load ? amx.tile[t].row[r] : memory + r * stride, load ? memory + r * stride : amx.tile[t].row[r],
               (size_t)amx.tile[t].bytes);
}

static void multiply_tiles(int sum, int a, int b)
{
    tile_products++;
    if (!amx.configured || amx.tile[a].rows != amx.tile[sum].rows || amx.tile[b].bytes != amx.tile[sum].bytes
        || amx.tile[a].bytes != 4 * amx.tile[b].rows)
        abort();
    for (int m = 0; m < amx.tile[a].rows; m++)
        for (int n = 0; n < amx.tile[b].bytes / 4; n++) {
            uint32_t total;
            memcpy(&total, amx.tile[sum].row[m] + 4 * n, 4);
            for (int k = 0; k < amx.tile[b].rows; k++)
                for (int i = 0; i < 4; i++)
                    total += (uint32_t)((int8_t)amx.tile[a].row[m][4 * k + i] * amx.tile[b].row[k][4 * n + i]);
            memcpy(amx.tile[sum].row[m] + 4 * n, &total, 4);
        }
}

static float bfloat16(const uint8_t *bytes)
{
    const uint32_t bits = (uint32_t)bytes[0] << 16 | (uint32_t)bytes[1] << 24;
    float number;
    memcpy(&number, &bits, 4);
    return fabsf(number) < 0x1p-126f ? 0 : number;
}

static void multiply_bfloat16(int sum, int a, int b)
{
    tile_products++;
    if (!amx.configured || amx.tile[a].rows != amx.tile[sum].rows || amx.tile[b].bytes != amx.tile[sum].bytes
        || amx.tile[a].bytes != 4 * amx.tile[b].rows)
        abort();
    for (int m = 0; m < amx.tile[a].rows; m++)
        for (int n = 0; n < amx.tile[b].bytes / 4; n++) {
            float total, even = 0, odd = 0;
            for (int k = 0; k < amx.tile[b].rows; k++) {
                const uint8_t *x = amx.tile[a].row[m] + 4 * k, *y = amx.tile[b].row[k] + 4 * n;
                even = fmaf(bfloat16(x), bfloat16(y), even);
                odd = fmaf(bfloat16(x + 2), bfloat16(y + 2), odd);
            }
            memcpy(&total, amx.tile[sum].row[m] + 4 * n, 4);
            total += even + odd;
            memcpy(amx.tile[sum].row[m] + 4 * n, &total, 4);
        }
}

#define TILE_CONFIGURE(shapes) configure((const uint8_t *)(shapes))
#define TILE_RELEASE() (amx.configured = false)
#define TILE_ZERO(t) memset(amx.tile[t].row, 0, sizeof amx.tile[t].row)
#define TILE_LOAD(t, from, stride) move(t, (uint8_t *)(from), stride, true)
#define TILE_STORE(t, to, stride) move(t, (uint8_t *)(to), stride, false)
#define TILE_DOT(sum, a, b) multiply_tiles(sum, a, b)
#define TILE_DOT_BFLOAT16(sum, a, b) multiply_bfloat16(sum, a, b)
#define TILE_WRITTEN() ((void)0)

#define SATCHEL_ISA_AVXVNNI
#include "vector/vectors.h"

#include "isa/products_avxvnni.h"
#include "isa/tiles_amx.h"

#include "vector/all_linear.h"
#include "vector/all_attention.h"

static const Instructions emulated = {"amx", LINEAR_KERNELS, ATTENTION_KERNELS};
#else
#include "isa/avxvnni.c"
#define emulated avxvnni_instructions
#endif
#include "scratch.c"

static void one_after_another(void *pool, size_t tasks, void (*task)(void *data, size_t index), void *data)
{
    (void)pool;
    for (size_t i = 0; i < tasks; i++)
        task(data, i);
}

/* 0 on success. Numbers are inputs, block, hadamard, outputs, bits, gate, rows, whether rows are single tokens,
 * sequences, and whether scales are halves; operands are x, weights, scales, zero points, bias, residual, norm weight,
 * row offsets and y, NULL where there is none. */
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
                             .half_scales = numbers[9] != 0,
                             .zero_points = operands[3],
                             .bias = operands[4],
                             .residual = operands[5],
                             .norm_weight = operands[6],
                             .row_offsets = operands[7],
                             .sequences = numbers[8],
                             .y = operands[8]};
    return emulated.linear(&params, &call, &serial) != NULL;
}

/* 0 on success. Numbers are inputs, block, outputs and rows; operands are x, weights, scales and y. */
__attribute__((visibility("default"))) int run_table(const int64_t *numbers, void **operands)
{
    const Parallel serial = {NULL, one_after_another};
    const TableParams params = {.row = {.inputs = numbers[0], .block = numbers[1]}, .outputs = numbers[2]};
    const TableCall call
        = {.rows = numbers[3], .x = operands[0], .weights = operands[1], .scales = operands[2], .y = operands[3]};
    return emulated.table(&params, &call, &serial) != NULL;
}

/* 0 on success; 1 for a set that has no attention of its own. Numbers are batch, tokens, heads, key heads, head_dim,
 * whether the cache is float32, float16 or int8 (0 to 2), its capacity, total tokens, channels of the rotary tables,
 * their rows, whether pairs rotate, and the window; operands are query, key, value, their scales, the caches, seqlens_k,
 * cos, sin, the rows of the tables and y. */
__attribute__((visibility("default"))) int run_attention(const int64_t *numbers, float scale, float softcap, void **operands)
{
    const Parallel serial = {NULL, one_after_another};
    const AttentionCall call = {.batch = numbers[0],
                                .tokens = numbers[1],
                                .heads = numbers[2],
                                .kv_heads = numbers[3],
                                .own_heads = numbers[2],
                                .head_dim = numbers[4],
                                .query = operands[0],
                                .key = operands[1],
                                .value = operands[2],
                                .cache_type = (CacheType)numbers[5],
                                .key_scale = operands[3],
                                .value_scale = operands[4],
                                .past_key = operands[5],
                                .past_value = operands[6],
                                .past_capacity = numbers[6],
                                .present_key = operands[5],
                                .present_value = operands[6],
                                .capacity = numbers[6],
                                .seqlens_k = operands[7],
                                .total = (int32_t)numbers[7],
                                .cos = operands[8],
                                .sin = operands[9],
                                .rotary_row = operands[10],
                                .rotary_rows = numbers[9],
                                .rotary_half = numbers[8],
                                .interleaved = (int)numbers[10],
                                .scale = scale,
                                .softcap = softcap,
                                .window = numbers[11],
                                .out = operands[11]};
    size_t bytes;
    if (emulated.attention == NULL || emulated.attention_check(&call, &bytes) != NULL)
        return 1;
    void *scratch = thread_scratch(OF_RUN, bytes);
    return scratch == NULL || emulated.attention(&call, scratch, &serial) != NULL;
}

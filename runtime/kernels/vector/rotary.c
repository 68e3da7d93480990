#include "vectors.h"

#include <string.h>

#include "attention_internal.h"

/* Channels i and i + half. */
static void rotate_halves(const float *x, const float *cos, const float *sin, int64_t half, __m512 scale, float *out)
{
    for (int64_t i = 0; i < half; i += LANES) {
        __mmask16 mask = lanes(half - i);
        __m512 c = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, cos + i), scale);
        __m512 s = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, sin + i), scale);
        __m512 a = _mm512_maskz_loadu_ps(mask, x + i), b = _mm512_maskz_loadu_ps(mask, x + half + i);
        _mm512_mask_storeu_ps(out + i, mask, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        _mm512_mask_storeu_ps(out + half + i, mask, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

/* Channels 2i and 2i + 1. */
static void rotate_pairs(const float *x, const float *cos, const float *sin, int64_t half, __m512 scale, float *out)
{
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    for (int64_t i = 0; i < half; i += LANES / 2) {
        __mmask16 mask = lanes(min64(half - i, LANES / 2)), pairs = lanes(2 * (half - i));
        __m512 c = _mm512_permutexvar_ps(twice, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, cos + i), scale));
        __m512 s = _mm512_permutexvar_ps(twice, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, sin + i), scale));
        __m512 a = _mm512_maskz_loadu_ps(pairs, x + 2 * i), swapped = _mm512_permute_ps(a, 0xb1);
        _mm512_mask_storeu_ps(out + 2 * i, pairs, _mm512_fmaddsub_ps(a, c, _mm512_mul_ps(swapped, s)));
    }
}

static void rotate_head(const AttentionCall *call, const float *head, int64_t at, float scale, float *out)
{
    const __m512 factor = _mm512_set1_ps(scale);
    int64_t half = call->cos ? call->rotary_half : 0;
    if (half) {
        const float *cos = call->cos + at * half, *sin = call->sin + at * half;
        (call->interleaved ? rotate_pairs : rotate_halves)(head, cos, sin, half, factor, out);
    }
    for (int64_t i = 2 * half; i < call->head_dim; i += LANES) {
        __mmask16 mask = lanes(call->head_dim - i);
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, head + i), factor));
    }
}

static void append_tokens(const AttentionPlan *plan, int64_t row, int64_t kv_head, int64_t from, int64_t to)
{
    const AttentionCall *call = plan->call;
    int64_t past = past_tokens(call, row), head_dim = call->head_dim;
    for (int64_t token = from; token < to; token++) {
        int64_t offset = (first_token(call, row) + token) * plan->kv_width + kv_head * head_dim;
        int64_t place = place_of(plan, row, kv_head, past + token);
        rotate_head(call, plan->key + offset, rotary_row_of(call, row, token), 1.0f, call->present_key + place);
        memcpy(call->present_value + place, plan->value + offset, (size_t)head_dim * sizeof(float));
    }
}

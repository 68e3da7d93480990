#include "vectors.h"

#include <string.h>

#include "attention_internal.h"

/* Channels i and i + half. */
static void rotate_halves(const float *x, const float *cos, const float *sin, int64_t half, F16 scale, float *out)
{
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t left = half - i;
        const F16 c = mul(load_some(cos + i, left), scale), s = mul(load_some(sin + i, left), scale);
        const F16 a = load_some(x + i, left), b = load_some(x + half + i, left);
        store_some(out + i, left, mul_sub(a, c, mul(b, s)));
        store_some(out + half + i, left, mul_add(b, c, mul(a, s)));
    }
}

/* Channels 2i and 2i + 1. */
static void rotate_pairs(const float *x, const float *cos, const float *sin, int64_t half, F16 scale, float *out)
{
    const I16 even = is_equal(to_floats(both(lane_numbers(), ints(1))), floats(0));
    for (int64_t i = 0; i < half; i += LANES / 2) {
        const int64_t left = min64(half - i, LANES / 2);
        const F16 c = mul(load_some(cos + i, left), scale), s = mul(load_some(sin + i, left), scale);
        const F16 a = load_some(x + 2 * i, 2 * left), across = mul(swap_1(a), zip_low(s, s));
        store_some(out + 2 * i, 2 * left, mul_add(a, zip_low(c, c), flip_where(even, across)));
    }
}

static void rotate_head(const AttentionCall *call, const float *head, int64_t at, float scale, float *out)
{
    const F16 factor = floats(scale);
    int64_t half = call->cos ? call->rotary_half : 0;
    if (half) {
        const float *cos = call->cos + at * half, *sin = call->sin + at * half;
        (call->interleaved ? rotate_pairs : rotate_halves)(head, cos, sin, half, factor, out);
    }
    for (int64_t i = 2 * half; i < call->head_dim; i += LANES)
        store_some(out + i, call->head_dim - i, mul(load_some(head + i, call->head_dim - i), factor));
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

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

static void rotate_query(const AttentionPlan *plan, int64_t row, int64_t token, int64_t head, float *out)
{
    const AttentionCall *call = plan->call;
    rotate_head(call, query_of(plan, row, token, head), rotary_row_of(call, row, token), plan->query_scale, out);
    if (is_int8(call))
        scale_channels(call->head_dim, call->key_scale + head / plan->group * call->head_dim, out);
}

/* One head's x / scale, rounded to even, within -128 and 127. Multiplied by the reciprocal, as by ONNX Runtime's operator. */
static void quantize_head(const float *x, const float *scale, int64_t head_dim, int8_t *out)
{
    for (int64_t d = 0; d < head_dim; d += LANES) {
        const int64_t left = head_dim - d;
        const F16 step = divide(floats(1), load_some(scale + d, left)), y = mul(load_some(x + d, left), step);
        store_bytes(out + d, nearest(smaller(larger(y, floats(-128)), floats(127))), left);
    }
}

/* One head's numbers in half precision; those beyond its range become its largest. */
static void halve_head(const float *x, int64_t head_dim, uint16_t *out)
{
    const F16 most = floats(65504);
    for (int64_t d = 0; d < head_dim; d += LANES) {
        const F16 value = load_some(x + d, head_dim - d);
        const F16 within = smaller(larger(value, floats(-65504)), most);
        store_halves(out + d, choose(is_equal(value, value), within, value), head_dim - d);
    }
}

static void append_tokens(const AttentionPlan *plan, int64_t row, int64_t kv_head, int64_t from, int64_t to)
{
    const AttentionCall *call = plan->call;
    int64_t past = past_tokens(call, row), head_dim = call->head_dim;
    float rotated[MAX_HEAD_DIM];
    for (int64_t token = from; token < to; token++) {
        int64_t offset = (first_token(call, row) + token) * plan->kv_width + kv_head * head_dim;
        int64_t place = place_of(plan, row, kv_head, past + token);
        void *key = cache_at(call, call->present_key, place), *value = cache_at(call, call->present_value, place);
        const bool as_is = call->cache_type == CACHE_FLOAT;
        rotate_head(call, plan->key + offset, rotary_row_of(call, row, token), 1.0f, as_is ? key : rotated);
        if (is_int8(call)) {
            quantize_head(rotated, call->key_scale + kv_head * head_dim, head_dim, key);
            quantize_head(plan->value + offset, call->value_scale + kv_head * head_dim, head_dim, value);
        } else if (as_is) {
            memcpy(value, plan->value + offset, (size_t)head_dim * sizeof(float));
        } else {
            halve_head(rotated, head_dim, key);
            halve_head(plan->value + offset, head_dim, value);
        }
    }
}

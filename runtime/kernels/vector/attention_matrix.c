#include "vectors.h"

#include <math.h>
#include <string.h>

#include "attention_internal.h"
#include "exponential.h"
#include "../scratch.h"

/* A task of attention by a processor's products of matrices of bfloat16. Each float is the sum of two such numbers, which
 * have 16 bits of it, and the product of two floats is that of their upper ones and of each upper one by the other's lower
 * one: below, what `lower` ones have. A product has 32 terms, in 16 pairs: i and i + 16 of each 32, so that pairs are
 * made without moving lanes. Scores are [keys][rows] and sums [channels][rows], so that softmax runs along the lanes.
 * Blocks of keys, and pairs, start at multiples of BLOCK from the start of the cache, and what a row does not see is zero,
 * so the result of a row does not depend on the other rows. */
enum {
    UPPER,
    LOWER,
    SPLIT, /* numbers that a float becomes */
    TERMS = 2 * LANES,
    MOST_PAIRS = MAX_HEAD_DIM / 2,
    BLOCK_PAIRS = BLOCK / 2,
    STRIP = 4, /* vectors of rows whose scores are in the first cache */
    /* From a key or channel to the next: not powers of two, which would share lines of the cache. */
    APART = TILE + LANES,
    STRIP_APART = (STRIP + 1) * LANES,
};

typedef struct {
    QueryRows rows;
    int64_t pairs; /* of channels; a multiple of 16 */
    _Alignas(BYTES) int32_t query[SPLIT][MOST_PAIRS * APART];        /* [pairs][rows], rotated and scaled */
    _Alignas(BYTES) int32_t key[SPLIT][BLOCK * MOST_PAIRS];          /* [keys][pairs] */
    _Alignas(BYTES) int32_t value[SPLIT][MAX_HEAD_DIM * BLOCK_PAIRS]; /* [channels][pairs of keys] */
    _Alignas(BYTES) float scores[BLOCK * STRIP_APART];               /* [keys][rows of a strip] */
    _Alignas(BYTES) int32_t power[SPLIT][BLOCK_PAIRS * STRIP_APART]; /* [pairs of keys][rows of a strip]: of the scores */
    _Alignas(BYTES) float sums[MAX_HEAD_DIM * APART];                /* [channels][rows] */
    float rotated[LANES * MAX_HEAD_DIM];
} MatrixTile;

/* The upper 16 bits of two vectors' lanes in one. */
INLINE F16 pair_of(F16 low, F16 high)
{
    I16 pair;
    EACH_PART pair.part[i] = (((PartI)low.part[i] >> 16) & 0xffff) | ((PartI)high.part[i] & ~0xffff);
    return bits_to_floats(pair);
}

/* The nearest number of bfloat16, the larger of two as near. */
INLINE F16 to_bfloat16(F16 x)
{
    I16 bits = bits_of(x);
    EACH_PART bits.part[i] = (bits.part[i] + 0x8000) & ~0xffff;
    return bits_to_floats(bits);
}

/* Pairs of two vectors, and of what is left of them. */
INLINE void split_pair(F16 low, F16 high, F16 *upper, F16 *lower)
{
    const F16 near_low = to_bfloat16(low), near_high = to_bfloat16(high);
    *upper = pair_of(near_low, near_high);
    *lower = pair_of(to_bfloat16(sub(low, near_low)), to_bfloat16(sub(high, near_high)));
}

/* 2^x for x up to 0, exactly 1 for 0 and 0 below 2^-126; relative error below 1.7e-7. The polynomial was fitted to 2^r, r in
 * [-1/2, 1/2]: half of the work of exp2_lanes, whose bits other instruction sets have, too. */
INLINE F16 exp2_below_0(F16 x)
{
    const F16 bounded = larger(floats(-126), x), whole = to_floats(nearest(bounded)), r = sub(bounded, whole);
    F16 p = floats(0x1.5bba14p-10f);
    p = mul_add(p, r, floats(0x1.3cea88p-7f));
    p = mul_add(p, r, floats(0x1.c6b752p-5f));
    p = mul_add(p, r, floats(0x1.ebf9bcp-3f));
    p = mul_add(p, r, floats(0x1.62e42ap-1f));
    p = mul_add(p, r, floats(1));
    return choose(is_below(x, floats(-126)), floats(0), times_power(p, whole));
}

/* 16 elements of a cache; zeros where fewer are left. */
INLINE F16 some_cached(const CacheType type, const void *cache, int64_t element, const bool whole, int64_t left)
{
    if (whole)
        return load_cached(type, cache, element, true, LANES);
    return left <= 0 ? floats(0) : load_cached(type, cache, element, left >= LANES, left);
}

static void configure_attention(void)
{
    TileShapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++)
        shapes.rows[tile] = SIDE, shapes.row_bytes[tile] = BYTES;
    TILE_CONFIGURE(&shapes);
}

static void split_queries(const AttentionPlan *plan, MatrixTile *tile)
{
    const int64_t head_dim = plan->call->head_dim;
    const int vectors = (tile->rows.used + 1) / 2 * 2; /* tiles are taken by two */
    for (int v = 0; v < vectors; v++) {
        rotate_rows(plan, &tile->rows, v * LANES, tile->rotated);
        for (int64_t pair = 0; pair < tile->pairs; pair += LANES) {
            F16 low[LANES], high[LANES], upper, lower;
            for (int r = 0; r < LANES; r++) {
                low[r] = some_cached(CACHE_FLOAT, tile->rotated, r * head_dim + 2 * pair, false, head_dim - 2 * pair);
                high[r] = some_cached(CACHE_FLOAT, tile->rotated, r * head_dim + 2 * pair + LANES, false,
                                      head_dim - 2 * pair - LANES);
            }
            transpose(low);
            transpose(high);
            for (int i = 0; i < LANES; i++) {
                split_pair(low[i], high[i], &upper, &lower);
                store((float *)tile->query[UPPER] + (pair + i) * APART + v * LANES, upper);
                store((float *)tile->query[LOWER] + (pair + i) * APART + v * LANES, lower);
            }
        }
    }
}

/* Pairs of the keys from..end of a block that begins at `start`, and zeros up to the next multiple of 32. */
INLINE void split_keys(const CacheType type, const bool whole, const AttentionPlan *plan, MatrixTile *tile, int64_t start,
                       int64_t from, int64_t end)
{
    const int64_t head_dim = plan->call->head_dim, pairs = tile->pairs;
    const int64_t first = start + (from - start) / TERMS * TERMS, last = start + (end - start + TERMS - 1) / TERMS * TERMS;
    for (int part = 0; part < (type == CACHE_INT8 ? 1 : SPLIT); part++) {
        memset(tile->key[part] + (first - start) * pairs, 0, (size_t)((from - first) * pairs) * sizeof(int32_t));
        memset(tile->key[part] + (end - start) * pairs, 0, (size_t)((last - end) * pairs) * sizeof(int32_t));
    }
    for (int64_t position = from, next; position < end; position = next) {
        next = run_end(plan, position, end);
        const int64_t place = place_of(plan, tile->rows.row, tile->rows.kv_head, position);
        const void *keys = cache_at(plan->call, plan->call->present_key, place);
        for (int64_t k = 0; k < next - position; k++)
            for (int64_t pair = 0; pair < pairs; pair += LANES) {
                const int64_t channel = 2 * pair, left = head_dim - channel, to = (position + k - start) * pairs + pair;
                F16 upper, lower;
                split_pair(some_cached(type, keys, k * head_dim + channel, whole, left),
                           some_cached(type, keys, k * head_dim + channel + LANES, whole, left - LANES), &upper, &lower);
                store((float *)tile->key[UPPER] + to, upper);
                if (type != CACHE_INT8)
                    store((float *)tile->key[LOWER] + to, lower);
            }
    }
}

/* Where the cache has 16 values from a position on, of which those from..end are read; all of them if `whole`. */
typedef struct {
    const void *values;
    int64_t low, high; /* of the 16, those that are read */
} SomeValues;

static SomeValues find_values(const AttentionPlan *plan, const MatrixTile *tile, int64_t position, int64_t from, int64_t end)
{
    const AttentionCall *call = plan->call;
    const int64_t low = max64(from, position), high = min64(end, position + LANES);
    if (low >= high) /* the position may have no block */
        return (SomeValues){call->present_value, 0, 0};
    /* Blocks have at least 16 positions, so these are in one. */
    const int64_t place = place_of(plan, tile->rows.row, tile->rows.kv_head, low) - (low - position) * call->head_dim;
    return (SomeValues){cache_at(call, call->present_value, place), low - position, high - position};
}

INLINE void load_values(const CacheType type, const bool whole, const SomeValues *some, int64_t channel, int64_t head_dim,
                        F16 *values)
{
    UNROLL
    for (int i = 0; whole && i < LANES; i++)
        values[i] = load_cached(type, some->values, i * head_dim + channel, true, LANES);
    for (int i = 0; !whole && i < LANES; i++) /* seldom, and so many loads are much code */
        values[i] = i < some->low || i >= some->high
            ? floats(0)
            : some_cached(type, some->values, i * head_dim + channel, false, head_dim - channel);
}

/* Pairs of 32 values, 16 channels of them, channel by channel. */
INLINE void split_channels(const CacheType type, const bool whole, const SomeValues *some, int64_t channel,
                           int64_t head_dim, int32_t *upper, int32_t *lower)
{
    F16 low[LANES], high[LANES];
    load_values(type, whole, some, channel, head_dim, low);
    load_values(type, whole, some + 1, channel, head_dim, high);
    UNROLL
    for (int i = 0; i < LANES; i++)
        split_pair(low[i], high[i], low + i, high + i);
    transpose(low);
    UNROLL
    for (int i = 0; i < LANES; i++)
        store((float *)upper + i * BLOCK_PAIRS, low[i]);
    if (type == CACHE_INT8)
        return;
    transpose(high);
    UNROLL
    for (int i = 0; i < LANES; i++)
        store((float *)lower + i * BLOCK_PAIRS, high[i]);
}

INLINE void split_values(const CacheType type, const bool whole_channels, const AttentionPlan *plan, MatrixTile *tile,
                         int64_t start, int64_t from, int64_t end)
{
    const int64_t head_dim = plan->call->head_dim;
    for (int64_t key = (from - start) / TERMS * TERMS; key < end - start; key += TERMS) {
        const SomeValues some[2] = {find_values(plan, tile, start + key, from, end),
                                    find_values(plan, tile, start + key + LANES, from, end)};
        const bool whole = whole_channels && from <= start + key && end >= start + key + TERMS;
        for (int64_t channel = 0; channel < 2 * tile->pairs; channel += LANES) {
            int32_t *upper = tile->value[UPPER] + channel * BLOCK_PAIRS + key / 2;
            int32_t *lower = tile->value[LOWER] + channel * BLOCK_PAIRS + key / 2;
            if (whole)
                split_channels(type, true, some, channel, head_dim, upper, lower);
            else
                split_channels(type, false, some, channel, head_dim, upper, lower);
        }
    }
}

static void split_block(const AttentionPlan *plan, MatrixTile *tile, int64_t start, int64_t from, int64_t end)
{
    const bool whole = plan->call->head_dim % TERMS == 0;
#define SPLIT_BLOCK(type)                                                \
    do {                                                                 \
        if (whole) {                                                     \
            split_keys(type, true, plan, tile, start, from, end);        \
            split_values(type, true, plan, tile, start, from, end);      \
        } else {                                                         \
            split_keys(type, false, plan, tile, start, from, end);       \
            split_values(type, false, plan, tile, start, from, end);     \
        }                                                                \
    } while (0)
    if (plan->call->cache_type == CACHE_FLOAT)
        SPLIT_BLOCK(CACHE_FLOAT);
    else if (plan->call->cache_type == CACHE_HALF)
        SPLIT_BLOCK(CACHE_HALF);
    else
        SPLIT_BLOCK(CACHE_INT8);
#undef SPLIT_BLOCK
}

/* SplitOperands of two by two tiles of sums. Rows of `a` and `b` are so many numbers apart. */
typedef struct {
    const int32_t *a[SPLIT], *b[SPLIT];
    int64_t a_apart, b_apart, steps;
    bool fine; /* `a` has lower numbers that are not zero */
} SplitOperands;

/* Tiles 4 and 5, one below the other, times 6 and 7, side by side. */
INLINE void add_four_products(void)
{
    TILE_DOT_BFLOAT16(0, 4, 6);
    TILE_DOT_BFLOAT16(1, 4, 7);
    TILE_DOT_BFLOAT16(2, 5, 6);
    TILE_DOT_BFLOAT16(3, 5, 7);
}

/* Adds the products of two tiles of `a`, one below the other, and two of `b`, side by side, to tiles 0 to 3. */
static void add_split(const SplitOperands *o)
{
    const int64_t a_bytes = o->a_apart * (int64_t)sizeof(int32_t), b_bytes = o->b_apart * (int64_t)sizeof(int32_t);
    for (int64_t step = 0; step < o->steps; step++) {
        const int64_t a = step * LANES, below = a + SIDE * o->a_apart, b = step * LANES * o->b_apart;
        TILE_LOAD(4, o->a[UPPER] + a, a_bytes);
        TILE_LOAD(5, o->a[UPPER] + below, a_bytes);
        TILE_LOAD(6, o->b[LOWER] + b, b_bytes);
        TILE_LOAD(7, o->b[LOWER] + b + SIDE, b_bytes);
        add_four_products();
        TILE_LOAD(6, o->b[UPPER] + b, b_bytes);
        TILE_LOAD(7, o->b[UPPER] + b + SIDE, b_bytes);
        add_four_products();
        if (!o->fine)
            continue;
        TILE_LOAD(4, o->a[LOWER] + a, a_bytes);
        TILE_LOAD(5, o->a[LOWER] + below, a_bytes);
        add_four_products();
    }
}

INLINE void store_sums(float *to, const int64_t apart)
{
    TILE_STORE(0, to, apart * sizeof(float));
    TILE_STORE(1, to + SIDE, apart * sizeof(float));
    TILE_STORE(2, to + SIDE * apart, apart * sizeof(float));
    TILE_STORE(3, to + SIDE * apart + SIDE, apart * sizeof(float));
}

/* The keys of a block that rows of a vector see, of STRIP vectors. */
typedef struct {
    int first_vector, vectors;
    int64_t from[STRIP + 1], to[STRIP + 1]; /* one past the last sees none: vectors are taken by two */
} RowStrip;

/* Scores of keys and rows that see one another, by 32 keys and 2 vectors. */
static void score_strip(MatrixTile *tile, const RowStrip *strip, int64_t start, int64_t keys, bool fine)
{
    SplitOperands operands = {.a_apart = tile->pairs, .b_apart = APART, .steps = tile->pairs / LANES, .fine = fine};
    for (int64_t key = 0; key < keys; key += TERMS)
        for (int v = 0; v < strip->vectors; v += 2) {
            const int64_t low = min64(strip->from[v], strip->from[v + 1]), high = max64(strip->to[v], strip->to[v + 1]);
            if (high <= start + key || low >= start + key + TERMS)
                continue;
            for (int part = 0; part < SPLIT; part++) {
                operands.a[part] = tile->key[part] + key * tile->pairs;
                operands.b[part] = tile->query[part] + (strip->first_vector + v) * LANES;
            }
            TILE_ZERO(0);
            TILE_ZERO(1);
            TILE_ZERO(2);
            TILE_ZERO(3);
            add_split(&operands);
            store_sums(tile->scores + key * STRIP_APART + v * LANES, STRIP_APART);
        }
}

/* Scores of one vector of rows to pairs of powers of their own maximum, and the sums so far to the same maximum. */
static void softmax_pairs(MatrixTile *tile, const RowStrip *strip, int v, int64_t start, int64_t keys, float cap)
{
    QueryRows *rows = &tile->rows;
    const int vector = strip->first_vector + v;
    const int64_t from = strip->from[v], to = strip->to[v];
    const int64_t first = (from - start) / TERMS * TERMS, last = (to - start + TERMS - 1) / TERMS * TERMS;
    float *scores = tile->scores + v * LANES;
    const F16 old = rows->maximum[vector];
    F16 maximum = old, total[2] = {floats(0), floats(0)};
    for (int64_t key = from; key < to; key++) {
        float *at = scores + (key - start) * STRIP_APART;
        const F16 score = seen_score(rows, vector, key, load(at), cap);
        if (cap > 0 || !all_see(rows, vector, key))
            store(at, score);
        maximum = larger(maximum, score);
    }
    for (int64_t key = first; key < last; key++)
        if (key < from - start || key >= to - start)
            store(scores + key * STRIP_APART, floats(-INFINITY));
    for (int64_t key = 0; key < keys; key += TERMS)
        for (int64_t k = key; k < key + LANES; k++) {
            F16 upper = floats(0), lower = floats(0);
            if (key >= first && key < last) {
                const F16 low = exp2_below_0(sub(load(scores + k * STRIP_APART), maximum));
                const F16 high = exp2_below_0(sub(load(scores + (k + LANES) * STRIP_APART), maximum));
                total[0] = add(total[0], low), total[1] = add(total[1], high);
                split_pair(low, high, &upper, &lower);
            }
            const int64_t pair = (k - key / 2) * STRIP_APART + v * LANES;
            store((float *)tile->power[UPPER] + pair, upper);
            store((float *)tile->power[LOWER] + pair, lower);
        }
    const F16 factor = exp2_lanes(sub(old, maximum));
    rows->maximum[vector] = maximum;
    rows->total[vector] = mul_add(rows->total[vector], factor, add(total[0], total[1]));
    if (!all_of(is_equal(factor, floats(1))))
        for (int64_t channel = 0; channel < 2 * tile->pairs; channel++) {
            float *at = tile->sums + channel * APART + vector * LANES;
            store(at, mul(load(at), factor));
        }
}

/* Adds the values of a block by the powers of their scores to the sums. */
static void weigh_values(MatrixTile *tile, const RowStrip *strip, int64_t start, bool fine)
{
    SplitOperands operands = {.a_apart = BLOCK_PAIRS, .b_apart = STRIP_APART, .fine = fine};
    TILE_WRITTEN();
    for (int v = 0; v < strip->vectors; v += 2) {
        const int64_t low = min64(strip->from[v], strip->from[v + 1]) - start;
        const int64_t high = max64(strip->to[v], strip->to[v + 1]) - start, pair = low / TERMS * LANES;
        operands.steps = (high + TERMS - 1) / TERMS - low / TERMS;
        for (int64_t channel = 0; channel < 2 * tile->pairs; channel += TERMS) {
            float *sums = tile->sums + channel * APART + (strip->first_vector + v) * LANES;
            for (int part = 0; part < SPLIT; part++) {
                operands.a[part] = tile->value[part] + channel * BLOCK_PAIRS + pair;
                operands.b[part] = tile->power[part] + pair * STRIP_APART + v * LANES;
            }
            TILE_LOAD(0, sums, APART * sizeof(float));
            TILE_LOAD(1, sums + SIDE, APART * sizeof(float));
            TILE_LOAD(2, sums + SIDE * APART, APART * sizeof(float));
            TILE_LOAD(3, sums + SIDE * APART + SIDE, APART * sizeof(float));
            add_split(&operands);
            store_sums(sums, APART);
        }
    }
}

/* Keys of a block that begins at `start`, a multiple of BLOCK: those from..end that some row sees. */
static void attend_matrix(const AttentionPlan *plan, MatrixTile *tile, int64_t start, int64_t from, int64_t end)
{
    const int64_t keys = (end - start + TERMS - 1) / TERMS * TERMS;
    const bool fine = !is_int8(plan->call);
    split_block(plan, tile, start, from, end);
    for (int vector = 0; vector < tile->rows.used; vector += STRIP) {
        RowStrip strip = {.first_vector = vector, .vectors = (int)min64(STRIP, tile->rows.used - vector)};
        for (int v = 0; v < strip.vectors; v++)
            find_seen(&tile->rows, vector + v, from, end, strip.from + v, strip.to + v);
        strip.from[strip.vectors] = strip.to[strip.vectors] = strip.from[strip.vectors - 1];
        score_strip(tile, &strip, start, keys, fine);
        for (int v = 0; v < strip.vectors; v++)
            softmax_pairs(tile, &strip, v, start, keys, plan->cap);
        weigh_values(tile, &strip, start, fine);
    }
}

static void store_outputs(const AttentionPlan *plan, const MatrixTile *tile)
{
    const QueryRows *rows = &tile->rows;
    const int64_t head_dim = plan->call->head_dim;
    for (int v = 0; v < rows->used; v++) {
        const F16 share = divide(floats(1), rows->total[v]);
        for (int64_t channel = 0; channel < head_dim; channel += LANES) {
            F16 out[LANES];
            for (int i = 0; i < LANES; i++)
                out[i] = mul(load(tile->sums + (channel + i) * APART + v * LANES), share);
            transpose(out);
            for (int r = v * LANES; r < rows->count && r < (v + 1) * LANES; r++) {
                float *to = out_of(plan->call, rows->row, token_of(rows, r), head_of(rows, r));
                store_some(to + channel, head_dim - channel, out[r - v * LANES]);
            }
        }
    }
    for (int r = 0; is_int8(plan->call) && r < rows->count; r++)
        scale_channels(head_dim, plan->call->value_scale + rows->kv_head * head_dim,
                       out_of(plan->call, rows->row, token_of(rows, r), head_of(rows, r)));
}

static void prefill_task(AttentionPlan *plan, int64_t index)
{
    MatrixTile *tile = thread_scratch(OF_TASK, sizeof *tile);
    if (tile == NULL) {
        atomic_store(&plan->failed, true);
        return;
    }
    find_rows(plan, index, &tile->rows);
    if (tile->rows.count == 0)
        return;
    tile->pairs = (plan->call->head_dim + TERMS - 1) / TERMS * LANES;
    split_queries(plan, tile);
    memset(tile->sums, 0, (size_t)(2 * tile->pairs * APART) * sizeof(float));
    const int64_t end = tile->rows.last[tile->rows.count - 1];
    configure_attention();
    for (int64_t key = tile->rows.first[0]; key < end;) {
        const int64_t start = key / BLOCK * BLOCK, next = min64(end, start + BLOCK);
        attend_matrix(plan, tile, start, key, next);
        key = next;
    }
    TILE_RELEASE();
    store_outputs(plan, tile);
}

#include "vectors.h"

#include <math.h>

#include "attention_internal.h"
#include "exponential.h"

/* Rows of queries of sequences with several new tokens. A task takes up to TILE of one key head, row by row, the heads of a
 * token being adjacent; softmax runs along the lanes of vectors of rows, online as in FlashAttention (Dao et al., 2022). */
#ifdef MATRIX_TILES
enum { TILE = 256, LEAST_TILE = 128 }; /* lower ones take too long to split keys and values */
#else
enum { TILE = 64, LEAST_TILE = LANES };
#endif
enum { VECTORS = TILE / LANES, BLOCK = 96, ENOUGH_TASKS = 16 };

typedef struct {
    int64_t row, kv_head, start; /* of the batch; the first query row */
    int64_t head, heads;         /* of the queries, the first one of this key head and how many it has */
    int count, used;             /* query rows, and vectors of them; none: all heads' are in other tasks */
    int32_t first[TILE], last[TILE];              /* the keys that a row attends to: first <= key < last */
    int32_t all_from[VECTORS], all_to[VECTORS];   /* those that all rows of a vector attend to */
    F16 maximum[VECTORS], total[VECTORS];
} QueryRows;

static int64_t prefill_tiles(const AttentionCall *call, int64_t row, int64_t height)
{
    int64_t rows = new_tokens(call, row) * (call->heads / call->kv_heads);
    return (rows + height - 1) / height;
}

/* Chooses tiles that are low enough to occupy all threads, and counts them. */
static void prefill_plan(AttentionPlan *plan)
{
    const AttentionCall *call = plan->call;
    for (plan->height = TILE;; plan->height /= 2) {
        plan->tiles[0] = 0;
        for (int64_t row = 0; row < call->batch; row++)
            plan->tiles[row + 1]
                = plan->tiles[row] + (new_tokens(call, row) == 1 ? 0 : prefill_tiles(call, row, plan->height));
        if (plan->height == LEAST_TILE || plan->tiles[call->batch] * call->kv_heads >= ENOUGH_TASKS)
            return;
    }
}

/* Which rows a task takes, and the keys that each of them sees. */
static void find_rows(const AttentionPlan *plan, int64_t index, QueryRows *rows)
{
    const AttentionCall *call = plan->call;
    /* Head by head, so that keys and values stay in the second cache. */
    const int64_t tiles = plan->tiles[call->batch], place = index % tiles, row = part_of(plan->tiles, call->batch, place);
    rows->row = row, rows->kv_head = index / tiles;
    rows->start = (plan->tiles[row + 1] - 1 - place) * plan->height; /* longest first */
    rows->head = first_head(plan, rows->kv_head), rows->heads = last_head(plan, rows->kv_head) - rows->head;
    rows->count = (int)max64(0, min64(plan->height, new_tokens(call, row) * rows->heads - rows->start));
    rows->used = (rows->count + LANES - 1) / LANES;
    for (int r = 0; r < rows->used * LANES; r++) {
        const int64_t position = past_tokens(call, row) + (rows->start + r) / rows->heads;
        rows->first[r] = r < rows->count ? (int32_t)first_key(call, position) : 0;
        rows->last[r] = r < rows->count ? (int32_t)(position + 1) : 0;
    }
    for (int v = 0; v < rows->used; v++) {
        rows->all_from[v] = 0, rows->all_to[v] = INT32_MAX;
        for (int r = v * LANES; r < (v + 1) * LANES; r++) {
            rows->all_from[v] = (int32_t)max64(rows->all_from[v], rows->first[r]);
            rows->all_to[v] = (int32_t)min64(rows->all_to[v], rows->last[r]);
        }
        rows->maximum[v] = floats(-0x1p+126f); /* finite: infinity minus infinity is NaN */
        rows->total[v] = floats(0);
    }
}

static int64_t token_of(const QueryRows *rows, int r) { return (rows->start + r) / rows->heads; }

static int64_t head_of(const QueryRows *rows, int r) { return rows->head + (rows->start + r) % rows->heads; }

/* Rotated and scaled queries of the 16 rows from `from` on, to `rotated` [16][head_dim]; zeros beyond the last. */
static void rotate_rows(const AttentionPlan *plan, const QueryRows *rows, int from, float *rotated)
{
    const int64_t head_dim = plan->call->head_dim;
    for (int r = from; r < from + LANES; r++, rotated += head_dim)
        if (r < rows->count)
            rotate_query(plan, rows->row, token_of(rows, r), head_of(rows, r), rotated);
        else
            memset(rotated, 0, (size_t)head_dim * sizeof(float));
}

/* The keys of a block start..end that some row of a vector sees: from <= key < to. */
static void find_seen(const QueryRows *rows, int vector, int64_t start, int64_t end, int64_t *from, int64_t *to)
{
    const int64_t last = min64((vector + 1) * LANES, rows->count) - 1;
    *from = min64(end, max64(start, rows->first[vector * LANES]));
    *to = max64(*from, min64(end, rows->last[last]));
}

/* Whether all rows of a vector see a key. */
INLINE bool all_see(const QueryRows *rows, int vector, int64_t key)
{
    return key >= rows->all_from[vector] && key < rows->all_to[vector];
}

/* The scores of a key, capped, and those of rows that do not see it -infinity. */
INLINE F16 seen_score(const QueryRows *rows, int vector, int64_t key, F16 score, float cap)
{
    if (cap > 0)
        score = mul(tanh_lanes(score), floats(cap));
    if (!all_see(rows, vector, key)) {
        const I16 firsts = load_ints(rows->first + vector * LANES), lasts = load_ints(rows->last + vector * LANES);
        const I16 seen = both(is_less(firsts, ints((int32_t)key + 1)), is_less(ints((int32_t)key), lasts));
        score = choose(seen, score, floats(-INFINITY));
    }
    return score;
}

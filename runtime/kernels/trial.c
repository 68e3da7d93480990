#ifdef __linux__
#define _GNU_SOURCE /* for the processor of a thread */
#endif
#include "trial.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include "instruction_set.h"
#include "scratch.h"
#include "serial.h"

enum { INPUTS = 256, OUTPUTS = 80, ROWS = 40, SMALLEST_BLOCK = 32, THREADS = 2, MILLISECONDS = 60 };
enum { HEADS = 2, HEAD_DIM = 64, TOKENS = ROWS }; /* of attention */

typedef struct {
    LinearParams params;
    int64_t rows;
    bool single, half_scales;
} Case;

/* All kinds of weights, of one row and of many, and all that a row and an output go through. */
static const Case CASES[] = {
    {{.row = {INPUTS, 0, 0, 0}, .outputs = OUTPUTS, .bits = 8}, 1, true},
    {{.row = {INPUTS, 0, 1e-5f, 64}, .outputs = OUTPUTS, .bits = 8, .gate = GATE_SILU}, ROWS, false},
    {{.row = {INPUTS, SMALLEST_BLOCK, 0, 0}, .outputs = OUTPUTS, .bits = 8}, ROWS, false},
    {{.row = {INPUTS, SMALLEST_BLOCK, 0, 0}, .outputs = OUTPUTS, .bits = 4}, 1, true},
    {{.row = {INPUTS, 128, 0, 0}, .outputs = OUTPUTS, .bits = 4}, ROWS, false, true},
    {{.row = {INPUTS, 0, 0, 0}, .outputs = OUTPUTS, .bits = 16}, 1, true},
    {{.row = {INPUTS, 0, 1e-5f, 0}, .outputs = OUTPUTS, .bits = 16}, ROWS, false},
};

/* Numbers that look random:  L'Ecuyer, Tables of Linear Congruential Generators (1999). */
static uint32_t next(uint32_t *state) { return (*state = *state * 1597334677u + 12345u) >> 16; }

static float next_float(uint32_t *state) { return (float)next(state) / 65536.f - 0.5f; }

enum { CASE_COUNT = sizeof CASES / sizeof *CASES };

/* What all cases multiply, and what plain C says that they give. */
static uint8_t weights[2 * (OUTPUTS + 32) * INPUTS];
static float x[ROWS * INPUTS], scales[(OUTPUTS + 32) * INPUTS / SMALLEST_BLOCK], wanted[CASE_COUNT][ROWS * OUTPUTS];
static uint16_t half_scales[sizeof scales / sizeof *scales];

static bool multiply(const Instructions *set, const Case *each, float *y)
{
    const LinearCall call = {.rows = each->rows,
                             .single = each->single,
                             .x = x,
                             .weights = weights,
                             .scales = each->half_scales ? (const void *)half_scales : scales,
                             .half_scales = each->half_scales,
                             .y = y};
    memset(y, 0, ROWS * OUTPUTS * sizeof *y);
    return set->linear(&each->params, &call, &SERIAL) == NULL;
}

static float query[TOKENS * HEADS * HEAD_DIM], wanted_attention[TOKENS * HEADS * HEAD_DIM];
static const float *const key = query + 1, *const value = query + 2; /* [TOKENS, 1, HEAD_DIM] */

/* A prompt without a past. */
static bool attend(const Instructions *set, float *y)
{
    const int32_t last = TOKENS - 1;
    float keys[TOKENS * HEAD_DIM], values[TOKENS * HEAD_DIM];
    const AttentionCall call = {.batch = 1,
                                .tokens = TOKENS,
                                .heads = HEADS,
                                .kv_heads = 1,
                                .own_heads = HEADS,
                                .head_dim = HEAD_DIM,
                                .query = query,
                                .key = key,
                                .value = value,
                                .past_key = keys,
                                .past_value = values,
                                .past_capacity = TOKENS,
                                .present_key = keys,
                                .present_value = values,
                                .capacity = TOKENS,
                                .seqlens_k = &last,
                                .total = TOKENS,
                                .out = y};
    size_t bytes;
    if (set->attention_check(&call, &bytes) != NULL)
        return false;
    void *memory = thread_scratch(OF_RUN, bytes);
    return memory != NULL && set->attention(&call, memory, &SERIAL) == NULL;
}

/* Within what sets differ by: one may attend in numbers of 16 bits. */
static bool attends_right(const Instructions *set)
{
    float y[TOKENS * HEADS * HEAD_DIM];
    bool right = attend(set, y);
    for (size_t i = 0; i < sizeof y / sizeof *y; i++)
        right = right && fabsf(y[i] - wanted_attention[i]) <= 1e-4f;
    return right;
}

static bool find_wanted(const Instructions *plain)
{
    uint32_t state = 1;
    for (size_t i = 0; i < sizeof weights; i++)
        weights[i] = (uint8_t)(next(&state) & (i % 2 ? 0xbf : 0xff)); /* finite as halves, too */
    for (size_t i = 0; i < sizeof x / sizeof *x; i++)
        x[i] = next_float(&state);
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++)
        scales[i] = next_float(&state);
    for (size_t i = 0; i < sizeof half_scales / sizeof *half_scales; i++)
        half_scales[i] = (uint16_t)(next(&state) & 0xbfff); /* finite */
    for (size_t i = 0; i < sizeof query / sizeof *query; i++)
        query[i] = next_float(&state);
    for (size_t i = 0; i < CASE_COUNT; i++)
        if (!multiply(plain, CASES + i, wanted[i]))
            return false;
    return attend(plain, wanted_attention);
}

typedef struct {
    const Instructions *tried;
    int processor;
    clock_t end; /* of the process's time */
    bool right;
    float y[ROWS * OUTPUTS];
} Trial;

/* Multiplies each case, and attends, again and again, on one processor: a system might not save all registers of a thread that waits. */
static void *try_cases(void *data)
{
    Trial *trial = data;
#ifdef __linux__
    cpu_set_t processors;
    CPU_ZERO(&processors);
    if (trial->processor >= 0 && trial->processor < CPU_SETSIZE) {
        CPU_SET((size_t)trial->processor, &processors);
        (void)sched_setaffinity(0, sizeof processors, &processors); /* else threads may be apart: no worse */
    }
#endif
    trial->right = true;
    do {
        for (size_t i = 0; i < CASE_COUNT && trial->right; i++)
            trial->right = multiply(trial->tried, CASES + i, trial->y) && memcmp(trial->y, wanted[i], sizeof trial->y) == 0;
        trial->right = trial->right && attends_right(trial->tried);
    } while (trial->right && clock() < trial->end);
    return NULL;
}

static bool is_right(const Instructions *tried)
{
    static Trial trials[THREADS];
    pthread_t threads[THREADS];
    bool started[THREADS], right = true;
    int processor = -1;
#ifdef __linux__
    processor = sched_getcpu();
#endif
    for (int i = 0; i < THREADS; i++) {
        trials[i].tried = tried;
        trials[i].processor = processor;
        trials[i].end = clock() + MILLISECONDS * (CLOCKS_PER_SEC / 1000);
        started[i] = pthread_create(threads + i, NULL, try_cases, trials + i) == 0;
        if (!started[i])
            try_cases(trials + i);
    }
    for (int i = 0; i < THREADS; i++) {
        if (started[i])
            pthread_join(threads[i], NULL);
        right = right && trials[i].right;
    }
    return right;
}

bool try_instruction_set(const char *name)
{
    const Instructions *chosen = instructions, *plain, *tried;
    const bool both = choose_instruction_set("plain") != NULL && (plain = instructions, choose_instruction_set(name) != NULL);
    tried = instructions;
    instructions = chosen;
    return both && find_wanted(plain) && is_right(tried);
}

#include "trial.h"

#include <string.h>

#include "instruction_set.h"

enum { INPUTS = 256, OUTPUTS = 80, ROWS = 40, SMALLEST_BLOCK = 32 };

typedef struct {
    LinearParams params;
    int64_t rows;
    bool single;
} Case;

/* All kinds of weights, of one row and of many, and all that a row and an output go through. */
static const Case CASES[] = {
    {{.row = {INPUTS, 0, 0, 0}, .outputs = OUTPUTS, .bits = 8}, 1, true},
    {{.row = {INPUTS, 0, 1e-5f, 64}, .outputs = OUTPUTS, .bits = 8, .gate = GATE_SILU}, ROWS, false},
    {{.row = {INPUTS, SMALLEST_BLOCK, 0, 0}, .outputs = OUTPUTS, .bits = 8}, ROWS, false},
    {{.row = {INPUTS, SMALLEST_BLOCK, 0, 0}, .outputs = OUTPUTS, .bits = 4}, 1, true},
    {{.row = {INPUTS, 128, 0, 0}, .outputs = OUTPUTS, .bits = 4}, ROWS, false},
    {{.row = {INPUTS, 0, 0, 0}, .outputs = OUTPUTS, .bits = 16}, 1, true},
    {{.row = {INPUTS, 0, 1e-5f, 0}, .outputs = OUTPUTS, .bits = 16}, ROWS, false},
};

static void one_after_another(void *pool, size_t tasks, void (*task)(void *data, size_t index), void *data)
{
    (void)pool;
    for (size_t i = 0; i < tasks; i++)
        task(data, i);
}

/* Numbers that look random:  L'Ecuyer, Tables of Linear Congruential Generators (1999). */
static uint32_t next(uint32_t *state) { return (*state = *state * 1597334677u + 12345u) >> 16; }

static float next_float(uint32_t *state) { return (float)next(state) / 65536.f - 0.5f; }

static bool is_right(const Instructions *tried, const Instructions *plain, const Case *each)
{
    static uint8_t weights[2 * (OUTPUTS + 32) * INPUTS];
    static float x[ROWS * INPUTS], scales[(OUTPUTS + 32) * INPUTS / SMALLEST_BLOCK], results[2][ROWS * OUTPUTS];
    const Parallel serial = {NULL, one_after_another};
    uint32_t state = 1;
    for (size_t i = 0; i < sizeof weights; i++)
        weights[i] = (uint8_t)(next(&state) & (each->params.bits == 16 && i % 2 ? 0xbf : 0xff)); /* finite halves */
    for (size_t i = 0; i < sizeof x / sizeof *x; i++)
        x[i] = next_float(&state);
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++)
        scales[i] = next_float(&state);
    memset(results, 0, sizeof results);
    LinearCall call = {.rows = each->rows, .single = each->single, .x = x, .weights = weights, .scales = scales};
    call.y = results[0];
    if (tried->linear(&each->params, &call, &serial) != NULL)
        return false;
    call.y = results[1];
    return plain->linear(&each->params, &call, &serial) == NULL && memcmp(results[0], results[1], sizeof *results) == 0;
}

bool try_instruction_set(const char *name)
{
    const Instructions *chosen = instructions, *plain, *tried;
    const bool both = choose_instruction_set("plain") != NULL && (plain = instructions, choose_instruction_set(name) != NULL);
    tried = instructions;
    instructions = chosen;
    for (size_t i = 0; both && i < sizeof CASES / sizeof *CASES; i++)
        if (!is_right(tried, plain, CASES + i))
            return false;
    return both;
}

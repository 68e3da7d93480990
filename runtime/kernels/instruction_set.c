#include "instruction_set.h"

#include <stdbool.h>
#include <string.h>

#include "processor.h"

extern const Instructions amx_instructions, avx512_instructions, avxvnni_instructions, avx2_instructions;
extern const Instructions i8mm_instructions, neon_instructions, plain_instructions;

const Instructions *instructions;

/* Fastest first. What a set does not have is taken from `rest`. */
static const struct {
    const Instructions *instructions;
    bool (*is_there)(void);
    const Instructions *rest;
} SETS[] = {
#if defined(__x86_64__)
#ifdef SATCHEL_AMX
    {&amx_instructions, has_amx, &avx512_instructions},
#endif
    {&avx512_instructions, has_avx512_vnni, NULL},
#ifdef SATCHEL_AVX_VNNI
    {&avxvnni_instructions, has_avx_vnni, &avx2_instructions},
#endif
    {&avx2_instructions, has_avx2, NULL},
#elif defined(__aarch64__)
#ifdef SATCHEL_I8MM
    {&i8mm_instructions, has_i8mm, &neon_instructions},
#endif
    {&neon_instructions, has_dot_products, NULL},
#endif
    {&plain_instructions, NULL, NULL},
};

enum { COUNT = sizeof SETS / sizeof *SETS };

const char *announced_instruction_set(size_t index)
{
    for (size_t i = 0; i < COUNT; i++)
        if ((SETS[i].is_there == NULL || SETS[i].is_there()) && index-- == 0)
            return SETS[i].instructions->name;
    return NULL;
}

static const Instructions *whole(size_t set)
{
    static Instructions made[COUNT];
    const Instructions *own = SETS[set].instructions;
    if (SETS[set].rest == NULL)
        return own;
    made[set] = *SETS[set].rest;
    made[set].name = own->name;
    made[set].linear = own->linear;
    made[set].round = own->round;
    made[set].places = own->places;
    made[set].measure_columns = own->measure_columns;
    made[set].round_columns = own->round_columns;
    made[set].table = own->table;
    if (own->attention != NULL) {
        made[set].attention_check = own->attention_check;
        made[set].attention = own->attention;
    }
    return &made[set];
}

const char *choose_instruction_set(const char *name)
{
    for (size_t i = 0; i < COUNT; i++) {
        const bool plain = SETS[i].is_there == NULL;
        if (name == NULL ? plain : strcmp(name, SETS[i].instructions->name) != 0)
            continue;
        if (!plain && !SETS[i].is_there())
            continue;
        instructions = whole(i);
        return instructions->name;
    }
    return NULL;
}

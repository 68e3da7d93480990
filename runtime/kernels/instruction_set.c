#include "instruction_set.h"

#include <stdbool.h>
#include <string.h>

#include "processor.h"

extern const Instructions avx512_instructions, avx2_instructions, neon_instructions, plain_instructions;

const Instructions *instructions;

/* Fastest first. */
static const struct {
    const Instructions *instructions;
    bool (*is_there)(void);
} SETS[] = {
#if defined(__x86_64__)
    {&avx512_instructions, has_avx512_vnni},
    {&avx2_instructions, has_avx2},
#elif defined(__aarch64__)
    {&neon_instructions, has_dot_products},
#endif
    {&plain_instructions, NULL},
};

const char *announced_instruction_set(size_t index)
{
    for (size_t i = 0; i < sizeof SETS / sizeof *SETS; i++)
        if ((SETS[i].is_there == NULL || SETS[i].is_there()) && index-- == 0)
            return SETS[i].instructions->name;
    return NULL;
}

const char *choose_instruction_set(const char *name)
{
    for (size_t i = 0; i < sizeof SETS / sizeof *SETS; i++) {
        const bool plain = SETS[i].is_there == NULL;
        if (name == NULL ? plain : strcmp(name, SETS[i].instructions->name) != 0)
            continue;
        if (!plain && !SETS[i].is_there())
            continue;
        instructions = SETS[i].instructions;
        return instructions->name;
    }
    return NULL;
}

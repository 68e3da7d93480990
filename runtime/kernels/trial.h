/* Tries an instruction set: whether this processor runs it, and runs it right. */
#ifndef SATCHEL_TRIAL_H
#define SATCHEL_TRIAL_H

#include <stdbool.h>

/* Whether linear layers of this instruction set give the bits of plain C. Ends the process if the processor announces an
 * instruction that it does not have. */
bool try_instruction_set(const char *name);

#endif

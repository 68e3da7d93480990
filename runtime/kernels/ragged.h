/* Row offsets: where the new tokens of each sequence begin in the row of all. */
#ifndef SATCHEL_RAGGED_H
#define SATCHEL_RAGGED_H

#include <stdbool.h>
#include <stdint.h>

/* Whether offsets [sequences + 1] split this many tokens into sequences of one or more. */
static inline bool splits(const int32_t *offsets, int64_t sequences, int64_t tokens)
{
    if (sequences < 1 || offsets[0] != 0 || offsets[sequences] != tokens)
        return false;
    for (int64_t i = 0; i < sequences; i++)
        if (offsets[i] >= offsets[i + 1])
            return false;
    return true;
}

#endif

/* What becomes of the sums of a linear layer: + bias, gate, + residual. */
#ifndef SATCHEL_OUTPUTS_H
#define SATCHEL_OUTPUTS_H

#include "gates.h"
#include "../linear.h"

/* Stores 16 outputs of a row, starting at 16 * column, out of `count`. */
INLINE void put_outputs(const LinearCall *call, int64_t row, int64_t column, int64_t count, F16 value)
{
    const int64_t first = column * LANES;
    if (call->residual != NULL)
        value = add(value, load_some(call->residual + row * count + first, count - first));
    store_some(call->y + row * count + first, count - first, value);
}

INLINE F16 bias_of(const LinearCall *call, int64_t first, int64_t end)
{
    return call->bias == NULL ? floats(0) : load_some(call->bias + first, end - first);
}

#endif

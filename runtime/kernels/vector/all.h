/* The kernels of one instruction set, as one translation unit. The file that includes this says which (isa/), and has
 * included vectors.h and the inner products before. */
#include "../instruction_set.h"

#include "rows.c"
#include "linear_sums.c"
#include "linear_tile.c"
#include "linear_float.c"
#include "linear.c"
#include "table_float.c"
#include "table.c"
#include "rotary.c"
#include "attention_decode.c"
#include "attention_prefill.c"
#include "attention.c"
#include "recurrence.c"
#include "convolution.c"

#define KERNELS                                                                                                   \
    .linear = linear_run, .table = table_run, .attention_check = attention_check, .attention = attention_run,     \
    .recurrence = recurrence_run, .convolution = convolution_run

/* The kernels of one instruction set, as one translation unit. The file that includes this says which (isa/). */
#include "vectors.h"

#include "../instruction_set.h"

#include "rows.c"
#include "rotary.c"
#include "attention_decode.c"
#include "attention_prefill.c"
#include "attention.c"
#include "recurrence.c"
#include "convolution.c"

#ifdef SATCHEL_ISA_AVX512 /* not yet written over vectors.h */
#include "native.h"
#include "table.c"
#include "linear.c"
#define LINEAR .linear = linear_run, .table = table_run
#else
#define LINEAR .linear = 0
#endif

#define KERNELS                                                                                                   \
    LINEAR, .attention_check = attention_check, .attention = attention_run, .recurrence = recurrence_run,          \
        .convolution = convolution_run

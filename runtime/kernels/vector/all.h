/* The kernels of one instruction set, as one translation unit. The file that includes this says which (isa/), and has
 * included vectors.h and the inner products before. */
#include "all_linear.h"

#include "all_attention.h"
#include "recurrence.c"
#include "convolution.c"
#include "rounding.c"

#define KERNELS                                                                                   \
    LINEAR_KERNELS, ATTENTION_KERNELS, .recurrence = recurrence_run, .convolution = convolution_run, \
    .choose_scales = choose_scales, .round_inputs = round_inputs, .descend_inputs = descend_inputs

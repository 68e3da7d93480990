/* The kernels of one instruction set, as one translation unit. The file that includes this says which (isa/). */
#include "vectors.h"

#include "../instruction_set.h"

#include "rows.c"
#include "recurrence.c"
#include "convolution.c"

#ifdef SATCHEL_ISA_AVX512 /* not yet written over vectors.h */
#include "native.h"
#include "table.c"
#include "linear.c"
#include "rotary.c"
#include "attention_decode.c"
#include "attention_prefill.c"
#include "attention.c"
#define LINEAR .linear = linear_run, .table = table_run
#define ATTENTION .attention_check = attention_check, .attention = attention_run
#else
#define LINEAR .linear = 0
#define ATTENTION .attention = 0
#endif

#define KERNELS LINEAR, ATTENTION, .recurrence = recurrence_run, .convolution = convolution_run

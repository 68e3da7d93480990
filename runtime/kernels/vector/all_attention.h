/* The kernels of attention of one instruction set, as all.h. */
#include "rotary.c"
#include "attention_rows.c"
#include "attention_decode.c"
#ifdef MATRIX_TILES
#include "attention_matrix.c"
#else
#include "attention_prefill.c"
#endif
#include "attention.c"

#define ATTENTION_KERNELS .attention_check = attention_check, .attention = attention_run

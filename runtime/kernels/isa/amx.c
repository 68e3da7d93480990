/* AMX: linear layers of many rows, and attention of several new tokens, by tiles; all else is AVX-512's. */
#include "../processor.h"

#ifdef SATCHEL_AMX
#define SATCHEL_ISA_AVX512
#include "../vector/vectors.h"

#include "products_avx512.h"
#include "tiles_amx.h"

#include "../vector/all_linear.h"
#include "../vector/all_attention.h"

const Instructions amx_instructions = {"amx", LINEAR_KERNELS, ATTENTION_KERNELS};
END_TARGET
#endif

/* AVX-512 with VNNI. */
#ifdef __x86_64__
#define SATCHEL_ISA_AVX512
#include "../vector/vectors.h"

#include "products_avx512.h"

#include "../vector/all.h"

const Instructions avx512_instructions = {"avx512", KERNELS};
END_TARGET
#endif

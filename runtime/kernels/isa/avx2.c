/* AVX2 with FMA. */
#ifdef __x86_64__
#define SATCHEL_ISA_AVX2
#include "../vector/vectors.h"

#include "products_avx2.h"

#include "../vector/all.h"

const Instructions avx2_instructions = {"avx2", KERNELS};
END_TARGET
#endif

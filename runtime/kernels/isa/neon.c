/* Arm with dot products. */
#ifdef __aarch64__
#define SATCHEL_ISA_NEON
#include "../vector/vectors.h"

#include "products_neon.h"

#include "../vector/all.h"

const Instructions neon_instructions = {"neon", KERNELS};
END_TARGET
#endif

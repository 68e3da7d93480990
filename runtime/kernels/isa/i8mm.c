/* Arm's matrix products of bytes: linear layers; all else is that of dot products. */
#include "../processor.h"

#ifdef SATCHEL_I8MM
#define SATCHEL_ISA_I8MM
#include "../vector/vectors.h"

#include "products_i8mm.h"

#include "../vector/all_linear.h"

const Instructions i8mm_instructions = {"i8mm", LINEAR_KERNELS};
END_TARGET
#endif

/* AVX-VNNI: linear layers; all else is AVX2's. */
#include "../processor.h"

#ifdef SATCHEL_AVX_VNNI
#define SATCHEL_ISA_AVXVNNI
#include "../vector/vectors.h"

#include "products_avxvnni.h"

#include "../vector/all_linear.h"

const Instructions avxvnni_instructions = {"avxvnni", LINEAR_KERNELS};
END_TARGET
#endif

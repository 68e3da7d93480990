/* C without extensions, right on any processor. */
#define SATCHEL_ISA_PLAIN
#include "../vector/vectors.h"

#include "products_plain.h"

#include "../vector/all.h"

const Instructions plain_instructions = {"plain", KERNELS};
END_TARGET

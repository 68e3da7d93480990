/* C without extensions, right on any processor. */
#define SATCHEL_ISA_PLAIN
#include "../vector/all.h"

const Instructions plain_instructions = {"plain", KERNELS};
END_TARGET

/* The kernel of a linear layer: its attributes. */
#ifndef SATCHEL_LINEAR_OP_H
#define SATCHEL_LINEAR_OP_H

#include "join.h"
#include "linear.h"
#include "operator.h"

enum { FIRST_WEIGHT = 1, END_OF_WEIGHTS = 5 }; /* inputs: the quantized values, scales, zero points and the bias */

typedef struct {
    LinearParams params;
    Joined joined; /* of a layer that joins what ranks have */
} LinearKernel;

void *create_linear(Create *create);

#endif

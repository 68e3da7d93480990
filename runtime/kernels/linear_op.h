/* The attributes of a linear layer. */
#ifndef SATCHEL_LINEAR_OP_H
#define SATCHEL_LINEAR_OP_H

#include "linear.h"
#include "operator.h"

/* Reads those of a node. Returns false if they do not go together. */
bool read_linear(Create *create, LinearParams *params);

#endif

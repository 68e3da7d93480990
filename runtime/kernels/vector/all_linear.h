/* The kernels of one instruction set that multiply bytes, as all.h. */
#include "../instruction_set.h"

#include "rows.c"
#include "linear_sums.c"
#include "linear_tile.c"
#include "linear_float.c"
#include "linear.c"
#include "table_float.c"
#include "table.c"

#define LINEAR_KERNELS .linear = linear_run, .round = linear_round, .places = linear_places,              \
    .measure_columns = linear_measure_columns, .round_columns = linear_round_columns, .table = table_run

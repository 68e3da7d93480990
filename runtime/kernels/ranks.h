/* The functions of MPI that satchel's operators for several ranks call, as the runner hands them over: no header of MPI is
 * needed, and one library serves all implementations. Handles are integers in some and pointers in others; both fit. */
#ifndef SATCHEL_RANKS_H
#define SATCHEL_RANKS_H

#include <stdint.h>

typedef intptr_t Handle;
typedef struct {
    _Alignas(16) char bytes[64]; /* room for any MPI_Request or MPI_Status */
} Opaque;

/* Field order and types are repeated in runtime/execution/ranks/wire.py. */
typedef struct {
    int (*all_reduce)(const void *mine, void *sum, int count, Handle type, Handle op, Handle group, Opaque *request);
    int (*gather)(const void *mine, int count, Handle type, void *all, const int *counts, const int *starts,
                  Handle all_type, int root, Handle group, Opaque *request);
    int (*all_gather)(const void *mine, int count, Handle type, void *all, const int *counts, const int *starts,
                      Handle all_type, Handle group, Opaque *request);
    int (*send)(const void *data, int count, Handle type, int to, int tag, Handle world, Opaque *request);
    int (*receive)(void *data, int count, Handle type, int from, int tag, Handle world, Opaque *request);
    int (*test)(Opaque *request, int *done, Opaque *status);
    Handle real, byte, sum, group, world; /* float32, bytes, addition; the ranks that share a layer, and all ranks */
    int32_t rank, ranks;                  /* in the group */
    int32_t previous, next;               /* among all, with the same part of the stages before and behind; -1: none */
} Ranks;

/* What the operators of this process have done since they were asked before. */
typedef struct {
    int64_t nanoseconds, calls, bytes;
} Traffic;

#endif

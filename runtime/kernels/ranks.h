/* The functions of MPI that satchel's operators for several ranks call, as the runner hands them over: no header of MPI is
 * needed, and one library serves all implementations. Handles are integers in some and pointers in others; both fit. */
#ifndef SATCHEL_RANKS_H
#define SATCHEL_RANKS_H

#include <stdatomic.h>
#include <stdint.h>

typedef intptr_t Handle;
typedef struct {
    _Alignas(16) char bytes[64]; /* room for any MPI_Request or MPI_Status */
} Opaque;

/* Memory of one rank that those of its group on the same machine read, zeros at first: what it has published last, and
 * before that. Rank r publishes number n in place n % 2 when all others have published number n - 1, for which they have
 * read number n - 2. */
enum { PLACES = 2, PLACE_BYTES = 1 << 18 };
typedef struct {
    _Alignas(64) _Atomic uint64_t published;
    _Alignas(64) char places[PLACES][PLACE_BYTES];
} Mailbox;

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
    Mailbox **mailboxes;                  /* one of each rank in the group; NULL: they share no memory */
} Ranks;

/* What the operators of this process have done since they were asked before. */
typedef struct {
    int64_t nanoseconds, calls, bytes;
} Traffic;

#endif

/* Rows of which each rank has some channels, joined for a linear layer (docs/several-devices.md). */
#ifndef SATCHEL_JOIN_H
#define SATCHEL_JOIN_H

#include "linear.h"
#include "operator.h"

/* What this rank reads as soon as it has what it waits for, and fetches meanwhile; NULL: it fetches nothing. */
typedef struct {
    const char *data;
    int64_t bytes;
} Stream;

/* What the other nodes of a graph read of the joined rows. */
typedef enum { OWN_ROWS, ALL_ROWS, NO_ROWS } Joined;

/* What is joined: the last axis of all ranks, in their order. */
typedef struct {
    const float *x;
    int64_t rows, own, total; /* rows, and numbers of each: this rank's and all */
    const int64_t *width;     /* of each rank */
    size_t rank;
    int64_t dims[MAX_RANK]; /* of the result */
    const float *added;     /* as the result, or NULL */
    Stream next;
} Join;

/* Reads x, and the inputs of a node that say the widths of all ranks and what is added; 0: nothing is. */
bool read_join(Run *run, size_t widths, size_t added, Join *join);

/* Joins rows into `all`, which is the x of a call, and quantizes them into memory of rounded_bytes. With many rows a rank
 * joins and quantizes some of them for all, and has only these in `all`, unless ALL_ROWS says that all are needed. If
 * nothing reads `all`, it may quantize its own columns instead, and leave `all` as it is. */
bool join_rounded(Run *run, const Join *join, const LinearParams *params, const LinearCall *call, Joined joined, float *all,
                  void *rounded);

#endif

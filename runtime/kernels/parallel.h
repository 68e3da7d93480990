/* How a kernel spreads its tasks over the threads of whoever called it. */
#ifndef SATCHEL_PARALLEL_H
#define SATCHEL_PARALLEL_H

#include <stddef.h>

typedef struct {
    void *pool;
    /* Calls task(data, index) once for each index below tasks, on any thread, and returns when all are done. */
    void (*run)(void *pool, size_t tasks, void (*task)(void *data, size_t index), void *data);
} Parallel;

#endif

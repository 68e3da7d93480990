/* Runs tasks on a thread pool. */
#ifndef SATCHEL_PARALLEL_H
#define SATCHEL_PARALLEL_H

#include <stddef.h>

typedef struct {
    void *pool;
    void (*run)(void *pool, size_t tasks, void (*task)(void *data, size_t index), void *data);
} Parallel;

static inline void parallel_for(const Parallel *parallel, size_t tasks, void (*task)(void *, size_t), void *data)
{
    if (tasks == 1)
        task(data, 0);
    else if (tasks > 1)
        parallel->run(parallel->pool, tasks, task, data);
}

#endif

/* Runs tasks one after another, on the thread that asks for them. */
#ifndef SATCHEL_SERIAL_H
#define SATCHEL_SERIAL_H

#include "parallel.h"

static inline void one_after_another(void *pool, size_t tasks, void (*task)(void *data, size_t index), void *data)
{
    (void)pool;
    for (size_t i = 0; i < tasks; i++)
        task(data, i);
}

static const Parallel SERIAL = {NULL, one_after_another};

#endif

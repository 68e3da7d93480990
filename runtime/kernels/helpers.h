/* Threads that help with the work for one token, and that a run does not wait for.
 *
 * Such a step is thousands of jobs of some microseconds each. Where another program keeps a core busy, the system takes a
 * helper off its core for milliseconds, in the middle of a job as a rule. So a helper writes its results to memory of its
 * own, from which the thread of the run copies them; what is not there in time, that thread computes itself. */
#ifndef SATCHEL_HELPERS_H
#define SATCHEL_HELPERS_H

#include <stdbool.h>
#include <stddef.h>

enum { MOST_HELPERS = 63, MOST_UNITS = 256 };

typedef struct {
    /* Does units `from` to `end`. `results` is NULL if units write to memory that they share: then it cannot fail. Returns
     * false if it is out of memory. */
    bool (*run)(const void *data, size_t from, size_t end, void *results);
    /* Read by `run`: memory of helpers_begin, what lives as long as a kernel, and, if units write to shared memory, any. */
    const void *data;
    size_t units; /* at most MOST_UNITS */
    /* Each unit writes its own unit_bytes of result_bytes. 0: it writes to shared memory, and all units are waited for. */
    size_t unit_bytes, result_bytes;
    /* What units read in their order, or NULL. Helpers that wait fetch the beginning of that of the next job. */
    const char *stream;
    size_t stream_bytes;
} Job;

/* Takes `helpers` helpers for this thread, and gives it `bytes` of memory, aligned to 64, for the data of one job. Returns
 * NULL if that cannot be: another thread has them, or there are no threads or no memory. */
void *helpers_begin(size_t helpers, size_t bytes);

/* Gives the helpers back without a job. */
void helpers_cancel(void);

/* Runs one job after helpers_begin, and gives the helpers back. This thread's results, and in the end all, are in `results`.
 * Returns false if it is out of memory. */
bool helpers_run(const Job *job, void *results);

/* Waits until no helper reads what an earlier job was given. */
void helpers_drain(void);

#endif

/* Scratch memory of the calling thread. */
#ifndef SATCHEL_SCRATCH_H
#define SATCHEL_SCRATCH_H

#include <stddef.h>

/* Memory of one run of an operator, of one of its tasks, and of what it has got from other ranks. All may be of one thread. */
typedef enum { OF_RUN, OF_TASK, OF_EXCHANGE } ScratchOwner;

/* Returns `bytes` bytes, 64-byte aligned and uninitialized, or NULL if out of memory. The thread's next call for the same
 * owner reuses the memory; it is freed when the thread ends. */
void *thread_scratch(ScratchOwner owner, size_t bytes);

#endif

/* Scratch memory of the calling thread. */
#ifndef SATCHEL_SCRATCH_H
#define SATCHEL_SCRATCH_H

#include <stddef.h>

/* Returns `bytes` bytes, 64-byte aligned and uninitialized, or NULL if out of memory. The thread's next call reuses the
 * memory; it is freed when the thread ends. */
void *thread_scratch(size_t bytes);

#endif

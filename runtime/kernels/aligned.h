/* Memory that begins at a whole number of cache lines. */
#ifndef SATCHEL_ALIGNED_H
#define SATCHEL_ALIGNED_H

#include <stdlib.h>

#ifdef _WIN32
#include <malloc.h>
#define aligned_alloc(alignment, bytes) _aligned_malloc(bytes, alignment)
#define free_aligned _aligned_free
#else
#define free_aligned free
#endif

#endif

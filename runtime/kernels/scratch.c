#include "scratch.h"

#include <pthread.h>
#include <stdbool.h>

#include "aligned.h"

enum { ALIGNMENT = 64 };

typedef struct {
    size_t bytes;
    _Alignas(ALIGNMENT) unsigned char memory[];
} Scratch;

static pthread_key_t keys[3]; /* by owner */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool has_keys;

static void make_keys(void)
{
    has_keys = pthread_key_create(&keys[OF_RUN], free_aligned) == 0
        && pthread_key_create(&keys[OF_TASK], free_aligned) == 0
        && pthread_key_create(&keys[OF_EXCHANGE], free_aligned) == 0;
}

void *thread_scratch(ScratchOwner owner, size_t bytes)
{
    pthread_once(&once, make_keys);
    if (!has_keys)
        return NULL;
    Scratch *current = pthread_getspecific(keys[owner]);
    if (current != NULL && current->bytes >= bytes)
        return current->memory;
    size_t total = (sizeof(Scratch) + bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    Scratch *larger = total > bytes ? aligned_alloc(ALIGNMENT, total) : NULL;
    if (larger == NULL)
        return NULL;
    free_aligned(current);
    larger->bytes = bytes;
    pthread_setspecific(keys[owner], larger);
    return larger->memory;
}

#include "scratch.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

enum { ALIGNMENT = 64 };

typedef struct {
    size_t bytes;
    _Alignas(ALIGNMENT) unsigned char memory[];
} Scratch;

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool has_key;

static void make_key(void) { has_key = pthread_key_create(&key, free) == 0; }

void *thread_scratch(size_t bytes)
{
    pthread_once(&once, make_key);
    if (!has_key)
        return NULL;
    Scratch *current = pthread_getspecific(key);
    if (current != NULL && current->bytes >= bytes)
        return current->memory;
    size_t total = (sizeof(Scratch) + bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    Scratch *larger = total > bytes ? aligned_alloc(ALIGNMENT, total) : NULL;
    if (larger == NULL)
        return NULL;
    free(current);
    larger->bytes = bytes;
    pthread_setspecific(key, larger);
    return larger->memory;
}

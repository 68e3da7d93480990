#ifdef __linux__
#define _GNU_SOURCE /* for the processors of a thread */
#endif
#include "helpers.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "aligned.h"

enum {
    SPIN = 50000,    /* nanoseconds that a helper looks for the next job before it sleeps */
    PATIENCE = 5000, /* and that a run waits for a helper's units, beside as long as the job took so far */
    LOOKS = 64,      /* between two looks at the clock */
    LINE = 64,       /* bytes */
    AHEAD = 1 << 18, /* bytes that a helper fetches of its share of the next job: they fit its second cache */
    FOLLOWERS = 1 << 12,
};

/* The units that are left of a participant's share: the first one, and the one after the last in the lower half. */
typedef struct {
    _Alignas(LINE) _Atomic uint32_t span;
} Share;

/* One job. A helper counts itself in as a reader and then looks whether the job is still there; a slot is written only
 * while it has no job and no readers. There are more slots than helpers, so one is always free. */
typedef struct {
    _Atomic size_t number; /* of the job; 0: none */
    _Atomic size_t readers;
    Job job;
    size_t participants; /* 0: the thread of the run; then the helpers */
    Share shares[1 + MOST_HELPERS];
    _Atomic uint8_t done[MOST_UNITS]; /* 1 + who did it */
    const char *results[1 + MOST_HELPERS];
    void *memory;
    size_t bytes;
} Slot;

static Slot *slots[1 + MOST_HELPERS];
static pthread_t threads[MOST_HELPERS];
static size_t helpers, taken_slot; /* of the thread that holds `taken` */
static pthread_mutex_t taken = PTHREAD_MUTEX_INITIALIZER;

static _Atomic size_t current; /* the number of the last job: its slot is the remainder */
static _Atomic size_t sleepers;
static pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t call = PTHREAD_COND_INITIALIZER;

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void pause_a_little(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause(); /* leaves the units of a shared core to its other thread */
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Takes half of what is left of one's own share, from its front, or else of another's, from its end. */
static bool claim(Slot *slot, size_t own, size_t *from, size_t *end)
{
    for (size_t i = 0; i < slot->participants; i++) {
        _Atomic uint32_t *span = &slot->shares[(own + i) % slot->participants].span;
        uint32_t left = atomic_load_explicit(span, memory_order_relaxed);
        for (;;) {
            const uint32_t first = left >> 16, last = left & 0xffff, half = (last - first + 1) / 2;
            if (first >= last)
                break;
            const uint32_t rest = i == 0 ? (first + half) << 16 | last : first << 16 | (last - half);
            if (!atomic_compare_exchange_weak(span, &left, rest))
                continue;
            *from = i == 0 ? first : last - half;
            *end = *from + half;
            return true;
        }
    }
    return false;
}

/* Returns false if it is out of memory: what was claimed last is not done then. */
static bool work(Slot *slot, size_t own, void *results)
{
    size_t from, end;
    while (claim(slot, own, &from, &end)) {
        if (!slot->job.run(slot->job.data, from, end, results))
            return false;
        for (; from < end; from++)
            atomic_store_explicit(&slot->done[from], (uint8_t)(1 + own), memory_order_release);
    }
    return true;
}

/* The stream of the job that came after one with another stream. Jobs repeat with each token. Streams may be gone by now:
 * fetching from an address where nothing is does nothing. */
static struct {
    const char *_Atomic stream, *_Atomic next;
    _Atomic size_t next_bytes;
} followers[FOLLOWERS];

static size_t place_of(const char *stream) { return ((uintptr_t)stream >> 6) * 0x9E3779B1u / 64 % FOLLOWERS; }

static void note_follower(const char *stream, const Job *next)
{
    const size_t place = place_of(stream);
    if (followers[place].stream == stream && followers[place].next == next->stream)
        return;
    followers[place].next = next->stream;
    followers[place].next_bytes = next->stream_bytes;
    followers[place].stream = stream;
}

/* Fetches the beginning of a share of what follows `stream`, until job `number` is not the last one any more. */
static void fetch_ahead(const char *stream, size_t own, size_t participants, size_t number)
{
    const size_t place = place_of(stream);
    if (stream == NULL || followers[place].stream != stream)
        return;
    const size_t bytes = followers[place].next_bytes, share = bytes / participants;
    const char *from = followers[place].next + bytes / participants * own;
    for (size_t at = 0; at < share && at < AHEAD && atomic_load(&current) == number; at += 16 * LINE)
        for (size_t line = 0; line < 16; line++)
            __builtin_prefetch(from + at + line * LINE, 0, 2);
}

static size_t next_job(size_t last)
{
    const int64_t begun = now();
    size_t found;
    for (int looks = 1; (found = atomic_load(&current)) == last; looks++) {
        pause_a_little();
        if (looks % LOOKS != 0 || now() - begun < SPIN)
            continue;
        pthread_mutex_lock(&bed);
        atomic_fetch_add(&sleepers, 1);
        while ((found = atomic_load(&current)) == last)
            pthread_cond_wait(&call, &bed);
        atomic_fetch_sub(&sleepers, 1);
        pthread_mutex_unlock(&bed);
        break;
    }
    return found;
}

static void *help(void *index)
{
    const size_t own = (size_t)index;
    void *results = NULL;
    size_t bytes = 0, number = 0;
    for (;;) {
        number = next_job(number);
        Slot *slot = slots[number % (1 + MOST_HELPERS)];
        atomic_fetch_add(&slot->readers, 1);
        const bool there = atomic_load(&slot->number) == number && own < slot->participants;
        if (there) {
            const size_t needed = slot->job.result_bytes;
            if (needed > bytes) {
                free(results);
                results = malloc(needed);
                bytes = results == NULL ? 0 : needed;
            }
            slot->results[own] = results;
            if (needed <= bytes)
                work(slot, own, needed == 0 ? NULL : results);
        }
        const char *stream = there ? slot->job.stream : NULL;
        const size_t participants = slot->participants;
        atomic_fetch_sub(&slot->readers, 1);
        if (stream != NULL)
            fetch_ahead(stream, own, participants, number);
    }
    return NULL;
}

#ifndef _WIN32
/* A process that was forked has none of its parent's helpers. */
static void forget_helpers(void)
{
    helpers = 0;
    atomic_store(&sleepers, 0);
    taken = bed = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    call = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    for (size_t i = 0; i <= MOST_HELPERS; i++)
        if (slots[i] != NULL) {
            atomic_store(&slots[i]->number, 0);
            atomic_store(&slots[i]->readers, 0);
        }
}
#endif

/* Makes slots before the helpers that use them. Returns whether there are as many helpers as that. */
static bool make_helpers(size_t wanted)
{
    static bool prepared;
    if (helpers >= wanted)
        return true;
    for (size_t i = 0; i <= MOST_HELPERS && slots[MOST_HELPERS] == NULL; i++)
        if (slots[i] == NULL && (slots[i] = aligned_alloc(LINE, sizeof(Slot))) != NULL)
            memset(slots[i], 0, sizeof(Slot));
        else if (slots[i] == NULL)
            return false;
#ifndef _WIN32
    prepared = prepared || pthread_atfork(NULL, NULL, forget_helpers) == 0;
    if (!prepared)
        return false;
#endif
    while (helpers < wanted) {
        if (pthread_create(threads + helpers, NULL, help, (void *)(helpers + 1)) != 0)
            return false;
        pthread_detach(threads[helpers]);
        helpers++;
    }
    return true;
}

void *helpers_begin(size_t wanted, size_t bytes)
{
    if (wanted == 0 || wanted > MOST_HELPERS || pthread_mutex_trylock(&taken) != 0)
        return NULL;
    if (make_helpers(wanted))
        for (taken_slot = 0; taken_slot <= MOST_HELPERS; taken_slot++) {
            Slot *slot = slots[taken_slot];
            if (atomic_load(&slot->readers) != 0)
                continue;
            if (slot->bytes < bytes) {
                free_aligned(slot->memory);
                slot->bytes = (bytes + LINE - 1) / LINE * LINE;
                slot->memory = aligned_alloc(LINE, slot->bytes);
                if (slot->memory == NULL) {
                    slot->bytes = 0;
                    break;
                }
            }
            slot->participants = 1 + wanted;
            return slot->memory;
        }
    pthread_mutex_unlock(&taken);
    return NULL;
}

#ifdef __linux__
/* Helpers leave the processor of the thread of the run to it. */
static void step_aside(void)
{
    static int left = -1;
    static size_t moved;
    const int cpu = sched_getcpu();
    cpu_set_t set;
    if (cpu < 0 || cpu >= CPU_SETSIZE || (cpu == left && moved == helpers) || sched_getaffinity(0, sizeof set, &set) != 0)
        return;
    CPU_CLR(cpu, &set);
    if (CPU_COUNT(&set) == 0)
        return;
    for (size_t i = 0; i < helpers; i++)
        pthread_setaffinity_np(threads[i], sizeof set, &set);
    left = cpu, moved = helpers;
}
#else
static void step_aside(void) {}
#endif

static void publish(Slot *slot, const Job *job)
{
    step_aside();
    static const char *last_stream;
    slot->job = *job;
    if (job->stream != NULL && last_stream != NULL)
        note_follower(last_stream, job);
    if (job->stream != NULL)
        last_stream = job->stream;
    memset((void *)slot->done, 0, job->units);
    for (size_t i = 0; i < slot->participants; i++)
        slot->shares[i].span = (uint32_t)(job->units * i / slot->participants << 16
                                          | job->units * (i + 1) / slot->participants);
    const size_t last = atomic_load(&current), number = (last / (1 + MOST_HELPERS) + 1) * (1 + MOST_HELPERS) + taken_slot;
    atomic_store(&slot->number, number);
    atomic_store(&current, number);
    if (atomic_load(&sleepers) > 0) {
        pthread_mutex_lock(&bed);
        pthread_cond_broadcast(&call);
        pthread_mutex_unlock(&bed);
    }
}

/* Waits for a unit that a helper has taken. Returns false when that takes too long. */
static bool wait_for(const Slot *slot, size_t unit, int64_t begun)
{
    const bool alone = slot->job.result_bytes == 0;
    const int64_t limit = 2 * (now() - begun) + PATIENCE;
    for (int looks = 1; slot->done[unit] == 0; looks++) {
        pause_a_little();
        if (looks % 16 != 0 || now() - begun < limit)
            continue;
        if (!alone)
            return false;
        sched_yield();
    }
    return true;
}

static size_t run_of(const Slot *slot, size_t unit, uint8_t who)
{
    while (unit < slot->job.units && slot->done[unit] == who)
        unit++;
    return unit;
}

static bool collect(const Slot *slot, int64_t begun, char *results)
{
    const Job *job = &slot->job;
    for (size_t unit = 0, end; unit < job->units; unit = end) {
        const bool there = slot->done[unit] != 0 || wait_for(slot, unit, begun);
        const uint8_t who = there ? slot->done[unit] : 0;
        end = run_of(slot, unit, who);
        if (!there) {
            end = end > unit ? end : unit + 1;
            if (!job->run(job->data, unit, end, results))
                return false;
        } else if (who > 1 && results != NULL) {
            const size_t first = unit * job->unit_bytes, last = end * job->unit_bytes;
            memcpy(results + first, slot->results[who - 1] + first, (last < job->result_bytes ? last : job->result_bytes) - first);
        }
    }
    return true;
}

void helpers_cancel(void) { pthread_mutex_unlock(&taken); }

bool helpers_run(const Job *job, void *results)
{
    Slot *slot = slots[taken_slot];
    const int64_t begun = now();
    publish(slot, job);
    const bool right = work(slot, 0, results) && collect(slot, begun, results);
    atomic_store(&slot->number, 0);
    pthread_mutex_unlock(&taken);
    return right;
}

void helpers_drain(void)
{
    for (size_t i = 0; i <= MOST_HELPERS; i++)
        while (slots[i] != NULL && atomic_load(&slots[i]->readers) != 0)
            sched_yield();
}

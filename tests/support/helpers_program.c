/* Jobs for helpers.c in which helpers are late on purpose. Prints what went wrong; nothing if all is right. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "helpers.h"

enum { UNITS = 200, HELPERS = 3, VALUES = 3 * UNITS - 1 }; /* the last unit has fewer values */

static pthread_t first_thread;
static _Atomic int stuck, caught;
static _Atomic size_t helped;
static int shared[VALUES];

typedef struct {
    int factor, milliseconds;
} Numbers;

static void sleep_for(int milliseconds)
{
    nanosleep(&(struct timespec){0, milliseconds * 1000000L}, NULL);
}

static int value(const Numbers *numbers, size_t index) { return numbers->factor * (int)(index * index + 1); }

static bool fill(const void *data, size_t from, size_t end, void *results)
{
    const Numbers *numbers = data;
    int *to = results == NULL ? shared : results;
    const bool helps = !pthread_equal(pthread_self(), first_thread);
    if (helps) {
        helped += end - from;
        caught += stuck;
        while (stuck) /* until the job is over, and longer */
            sleep_for(1);
    }
    sleep_for(numbers->milliseconds);
    for (size_t i = 3 * from; i < 3 * end && i < VALUES; i++)
        to[i] = value(numbers, i);
    return true;
}

static bool fail(const void *data, size_t from, size_t end, void *results)
{
    return (void)data, (void)from, (void)end, (void)results, false;
}

static void expect(bool right, const char *what, int factor)
{
    if (!right)
        printf("%s (%d)\n", what, factor);
}

static void run(int factor, int milliseconds, bool own_results)
{
    int results[VALUES] = {0};
    memset(shared, 0, sizeof shared);
    Numbers *numbers = helpers_begin(HELPERS, sizeof *numbers);
    if (numbers == NULL) {
        printf("no helpers\n");
        return;
    }
    *numbers = (Numbers){factor, milliseconds};
    Job job = {.run = fill, .data = numbers, .units = UNITS};
    if (own_results)
        job.unit_bytes = 3 * sizeof *results, job.result_bytes = sizeof results;
    expect(helpers_run(&job, own_results ? results : NULL), "a job failed", factor);
    for (size_t i = 0; i < VALUES; i++)
        if ((own_results ? results : shared)[i] != factor * (int)(i * i + 1)) {
            printf("value %zu of job %d is wrong\n", i, factor);
            return;
        }
}

static void *take(void *memory)
{
    *(void **)memory = helpers_begin(HELPERS, 1);
    return NULL;
}

int main(void)
{
    first_thread = pthread_self();
    for (int job = 1; job <= 2000; job++)
        run(job, 0, job % 3 != 0);
    for (int job = 1; job <= 5; job++)
        run(job, 1, job % 2 == 0);
    expect(helped > 0, "no helper has done anything", 0);

    stuck = 1;
    for (int job = 1; job <= 300 || (caught == 0 && job < 30000); job++)
        run(job, 0, true); /* returns though helpers are stuck in this job or in one before */
    expect(caught > 0, "no helper was stuck", 0);
    stuck = 0;
    helpers_drain();
    for (int job = 1; job <= 300; job++)
        run(-job, 0, job % 2 == 0);

    Job failing = {.run = fail, .units = UNITS, .unit_bytes = 4, .result_bytes = 4 * UNITS};
    int results[UNITS];
    failing.data = helpers_begin(HELPERS, 8);
    expect(!helpers_run(&failing, results), "a job that fails is said to be done", 0);
    run(7, 0, true);

    void *memory = helpers_begin(HELPERS, 100000), *other = &memory;
    pthread_t thread;
    pthread_create(&thread, NULL, take, &other);
    pthread_join(thread, NULL);
    expect(memory != NULL && other == NULL, "two threads have the helpers", 0);
    helpers_cancel();
    expect(helpers_begin(0, 8) == NULL && helpers_begin(MOST_HELPERS + 1, 8) == NULL, "too few or too many helpers", 0);

    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        for (int job = 1; job <= 300; job++)
            run(job, 0, job % 2 == 0);
        helpers_drain();
        fflush(stdout);
        _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    expect(status == 0, "a forked process failed", status);
    return 0;
}

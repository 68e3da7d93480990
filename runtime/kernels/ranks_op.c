/* satchel:AllReduce and satchel:GatherLogits: where ranks that share a layer exchange what each has computed
 * (docs/several-devices.md). */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef _WIN32
#include <windows.h>
#else
#include <sched.h>
#endif

#include "operator.h"
#include "ranks.h"
#include "scratch.h"

enum { WIRE_BLOCK = 64, MAX_RANKS = 4096 };

static Ranks ranks;
static Traffic traffic;

static int64_t now(void)
{
    struct timespec time;
    timespec_get(&time, TIME_UTC);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void pause_for(int64_t waited)
{
    enum { SPIN = 200000, YIELD = 3000000 }; /* nanoseconds */
    if (waited < SPIN)
        return;
#ifdef _WIN32
    Sleep(waited < YIELD ? 0 : 1);
#else
    if (waited < YIELD)
        sched_yield();
    else
        nanosleep(&(struct timespec){0, 50000}, NULL);
#endif
}

/* Waits until a request is complete. A rank that waits for long sleeps in between and leaves its core to others. What it
 * waits for may never come: the runner watches the other ranks, and ends this process then. */
static bool wait_for(Opaque *request, int64_t start)
{
    Opaque status;
    int done = 0;
    for (;;) {
        if (ranks.test(request, &done, &status) != 0)
            return false;
        if (done)
            return true;
        pause_for(now() - start);
    }
}

static void count(int64_t start, int64_t bytes)
{
    traffic.nanoseconds += now() - start;
    traffic.calls++;
    traffic.bytes += bytes;
}

/* Without the others a rank's numbers are of no use, but its speed is: satchel specialize measures that. */
static bool alone(void) { return ranks.test == NULL; }

static bool failed(Run *run) { return fail(run, "satchel: MPI could not exchange data with the other ranks"); }

typedef struct {
    int64_t wire;
} AllReduceParams;

static void *create_all_reduce(Create *create)
{
    AllReduceParams *params = malloc(sizeof *params);
    if (params == NULL) {
        create->error = "satchel:AllReduce: out of memory";
        return NULL;
    }
    params->wire = attribute(create, "wire", 32);
    if (params->wire == 32 || params->wire == 8)
        return params;
    free(params);
    create->error = "satchel:AllReduce: attribute wire is neither 32 nor 8";
    return NULL;
}

/* Rounds blocks of WIRE_BLOCK numbers to int8, each with a scale in front of them. */
static void round_blocks(const float *x, int64_t numbers, char *packed)
{
    for (int64_t first = 0; first < numbers; first += WIRE_BLOCK, packed += sizeof(float) + WIRE_BLOCK) {
        const int64_t size = numbers - first < WIRE_BLOCK ? numbers - first : WIRE_BLOCK;
        float largest = 1e-30f;
        for (int64_t i = 0; i < size; i++)
            largest = fmaxf(largest, fabsf(x[first + i]));
        const float scale = largest / 127, inverse = 127 / largest;
        memcpy(packed, &scale, sizeof scale);
        int8_t *codes = (int8_t *)packed + sizeof scale;
        for (int64_t i = 0; i < WIRE_BLOCK; i++)
            codes[i] = i < size ? (int8_t)lrintf(x[first + i] * inverse) : 0;
    }
}

static void add_blocks(const char *packed, int64_t numbers, float *sum)
{
    for (int64_t first = 0; first < numbers; first += WIRE_BLOCK, packed += sizeof(float) + WIRE_BLOCK) {
        const int64_t size = numbers - first < WIRE_BLOCK ? numbers - first : WIRE_BLOCK;
        const int8_t *codes = (const int8_t *)packed + sizeof(float);
        float scale;
        memcpy(&scale, packed, sizeof scale);
        for (int64_t i = 0; i < size; i++)
            sum[first + i] += scale * codes[i];
    }
}

/* Every rank adds what it gets in the order of ranks, so that all have the same bits. */
static bool reduce_rounded(Run *run, const Tensor *x, float *sum)
{
    const int64_t bytes = (x->count + WIRE_BLOCK - 1) / WIRE_BLOCK * (sizeof(float) + WIRE_BLOCK);
    char *packed = thread_scratch(OF_RUN, bytes * (ranks.ranks + 1));
    Opaque request = {{0}};
    if (packed == NULL)
        return fail(run, "satchel:AllReduce: out of memory");
    if (bytes > INT32_MAX)
        return fail(run, "satchel:AllReduce: too many numbers in one run");
    round_blocks(x->data, x->count, packed);
    const int64_t start = now();
    if (ranks.all_gather(packed, (int)bytes, ranks.byte, packed + bytes, (int)bytes, ranks.byte, ranks.group, &request)
        || !wait_for(&request, start))
        return failed(run);
    count(start, bytes);
    memset(sum, 0, x->count * sizeof *sum);
    for (int rank = 0; rank < ranks.ranks; rank++)
        add_blocks(packed + bytes * (rank + 1), x->count, sum);
    return true;
}

static bool run_all_reduce(const void *kernel, Run *run)
{
    const AllReduceParams *params = kernel;
    Tensor x;
    float *sum;
    Opaque request = {{0}};
    if (!input(run, 0, ORT_FLOAT, &x) || !output(run, 0, x.dims, x.rank, &sum))
        return false;
    if (alone()) {
        memcpy(sum, x.data, x.count * sizeof *sum);
        return true;
    }
    if (x.count > INT32_MAX)
        return fail(run, "satchel:AllReduce: too many numbers in one run");
    if (params->wire == 8)
        return reduce_rounded(run, &x, sum);
    const int64_t start = now();
    if (ranks.all_reduce(x.data, sum, (int)x.count, ranks.real, ranks.sum, ranks.group, &request)
        || !wait_for(&request, start))
        return failed(run);
    count(start, x.count * sizeof *sum);
    return true;
}

static void *create_gather(Create *create)
{
    void *nothing = malloc(1);
    if (nothing == NULL)
        create->error = "satchel:GatherLogits: out of memory";
    return nothing;
}

/* Joins the last axis of all ranks, in their order, on the first rank of the group. Others have zeros. */
static bool run_gather(const void *kernel, Run *run)
{
    (void)kernel;
    Tensor x, widths;
    float *all;
    Opaque request = {{0}};
    if (!input(run, 0, ORT_FLOAT, &x) || !input(run, 1, ORT_INT64, &widths))
        return false;
    const int64_t members = alone() ? widths.count : ranks.ranks;
    if (x.rank == 0 || widths.count != members || widths.count > MAX_RANKS)
        return fail(run, "satchel:GatherLogits: the graph is for another number of ranks");
    const int64_t *width = widths.data, rows = x.count / (x.dims[x.rank - 1] ? x.dims[x.rank - 1] : 1);
    int counts[MAX_RANKS], starts[MAX_RANKS];
    int64_t total = 0;
    for (int rank = 0; rank < members; rank++) {
        counts[rank] = (int)(rows * width[rank]);
        starts[rank] = (int)(rows * total);
        total += width[rank];
    }
    const int64_t own = x.dims[x.rank - 1];
    if (rows * total > INT32_MAX || own > total || (!alone() && own != width[ranks.rank]))
        return fail(run, "satchel:GatherLogits: a rank has another width than the graph says");
    x.dims[x.rank - 1] = total;
    if (!output(run, 0, x.dims, x.rank, &all))
        return false;
    if (alone()) {
        memset(all, 0, rows * total * sizeof *all);
        for (int64_t row = 0; row < rows; row++)
            memcpy(all + row * total, (const float *)x.data + row * own, own * sizeof *all);
        return true;
    }
    const int root = ranks.rank == 0;
    float *received = rows == 1 || !root ? all : thread_scratch(OF_RUN, rows * total * sizeof *all);
    if (received == NULL)
        return fail(run, "satchel:GatherLogits: out of memory");
    const int64_t start = now();
    if (ranks.gather(x.data, (int)x.count, ranks.real, received, counts, starts, ranks.real, 0, ranks.group, &request)
        || !wait_for(&request, start))
        return failed(run);
    count(start, x.count * sizeof *all);
    if (!root)
        memset(all, 0, rows * total * sizeof *all);
    else if (rows > 1)
        for (int64_t row = 0, first = 0; row < rows; row++, first = 0)
            for (int rank = 0; rank < ranks.ranks; first += width[rank++])
                memcpy(all + row * total + first, received + starts[rank] + row * width[rank],
                       width[rank] * sizeof *all);
    return true;
}

#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

/* For satchel's runner: the functions of MPI, before the first run; and what has been exchanged since the last call. */
EXPORTED void satchel_join(const Ranks *functions) { ranks = *functions; }
EXPORTED Traffic satchel_traffic(void)
{
    const Traffic since = traffic;
    traffic = (Traffic){0};
    return since;
}

static const OrtElementType REDUCED[] = {ORT_FLOAT}, GATHERED[] = {ORT_FLOAT, ORT_INT64};

Operator all_reduce_operator = {.name = "AllReduce",
                                .inputs = 1,
                                .required = 1,
                                .outputs = 1,
                                .input_types = REDUCED,
                                .create = create_all_reduce,
                                .run = run_all_reduce};
Operator gather_logits_operator = {.name = "GatherLogits",
                                   .inputs = 2,
                                   .required = 2,
                                   .outputs = 1,
                                   .input_types = GATHERED,
                                   .create = create_gather,
                                   .run = run_gather};

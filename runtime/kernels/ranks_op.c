/* satchel:AllReduce, satchel:AllGather, satchel:RoundedGather and satchel:GatherLogits, where ranks that share a layer exchange what each has
 * computed, and satchel:Send and satchel:Receive, where a stage of layers hands it to the next one (docs/several-devices.md). */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef _WIN32
#include <windows.h>
#else
#include <sched.h>
#endif

#include "instruction_set.h"
#include "join.h"
#include "linear_op.h"
#include "ragged.h"
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
    if (waited < SPIN) {
#if defined(__x86_64__) || defined(_M_X64)
        __builtin_ia32_pause(); /* leaves the units of a shared core to its other thread */
#endif
        return;
    }
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

/* This rank's memory for what it publishes next, up to PLACE_BYTES. */
static char *open_place(void)
{
    Mailbox *mine = ranks.mailboxes[ranks.rank];
    return mine->places[atomic_load_explicit(&mine->published, memory_order_relaxed) % PLACES];
}

static void publish_place(void)
{
    Mailbox *mine = ranks.mailboxes[ranks.rank];
    const uint64_t number = atomic_load_explicit(&mine->published, memory_order_relaxed);
    atomic_store_explicit(&mine->published, number + 1, memory_order_release);
}

static void publish(const void *data, int64_t bytes)
{
    memcpy(open_place(), data, bytes);
    publish_place();
}

/* Fetches the next few lines of a stream. Returns false if there are none, or if the second cache has enough of them. */
static bool fetch_some(const Stream *stream, int64_t *at)
{
    enum { LINE = 64, SOME = 8 * LINE, MOST = 1 << 18 };
    if (stream->data == NULL || *at + SOME > stream->bytes || *at + SOME > MOST)
        return false;
    for (int64_t end = *at + SOME; *at < end; *at += LINE)
        __builtin_prefetch(stream->data + *at, 0, 2);
    return true;
}

static const Stream NOTHING = {NULL, 0};

/* What another rank has published as this one published last; waits for it. */
static const char *published_by(int rank, int64_t start, Stream next)
{
    const uint64_t number = atomic_load_explicit(&ranks.mailboxes[ranks.rank]->published, memory_order_relaxed);
    Mailbox *theirs = ranks.mailboxes[rank];
    int64_t fetched = 0;
    while (atomic_load_explicit(&theirs->published, memory_order_acquire) < number)
        pause_for(fetch_some(&next, &fetched) ? 0 : now() - start);
    return theirs->places[(number - 1) % PLACES];
}

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
    if (bytes * ranks.ranks > INT32_MAX)
        return fail(run, "satchel:AllReduce: too many numbers in one run");
    round_blocks(x->data, x->count, packed);
    int counts[MAX_RANKS], starts[MAX_RANKS];
    for (int rank = 0; rank < ranks.ranks; rank++) {
        counts[rank] = (int)bytes;
        starts[rank] = (int)bytes * rank;
    }
    const int64_t start = now();
    if (ranks.all_gather(packed, (int)bytes, ranks.byte, packed + bytes, counts, starts, ranks.byte, ranks.group, &request)
        || !wait_for(&request, start))
        return failed(run);
    count(start, bytes);
    memset(sum, 0, x->count * sizeof *sum);
    for (int rank = 0; rank < ranks.ranks; rank++)
        add_blocks(packed + bytes * (rank + 1), x->count, sum);
    return true;
}

/* Adds what all ranks have, in their order, so that all have the same bits. */
static void add_up(const float *x, int64_t numbers, float *sum)
{
    enum { MOST = PLACE_BYTES / sizeof(float) };
    for (int64_t first = 0; first < numbers; first += MOST) {
        const int64_t size = numbers - first < MOST ? numbers - first : MOST, start = now();
        publish(x + first, size * sizeof *x);
        for (int rank = 0; rank < ranks.ranks; rank++) {
            const float *part = rank == ranks.rank ? x + first : (const float *)published_by(rank, start, NOTHING);
            for (int64_t i = 0; i < size; i++)
                sum[first + i] = rank == 0 ? part[i] : sum[first + i] + part[i];
        }
    }
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
    if (ranks.mailboxes != NULL) {
        add_up(x.data, x.count, sum);
        count(start, x.count * sizeof *sum);
        return true;
    }
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
        create->error = "satchel: out of memory for an operator that joins parts";
    return nothing;
}

/* Puts a rank's part of some rows among those of others, and adds `added` to it, unless that is NULL. */
static void put_part(const float *part, int64_t rows, int64_t width, int64_t total, const float *added, float *all)
{
    for (int64_t row = 0; row < rows; row++, part += width, all += total) {
        if (added == NULL) {
            memcpy(all, part, width * sizeof *all);
            continue;
        }
        for (int64_t i = 0; i < width; i++)
            all[i] = part[i] + added[i];
        added += total;
    }
}

/* Joins rows of all ranks by their mailboxes, a few at a time, so that one rank copies while others publish. A row that is
 * larger than a mailbox is in pieces. Only those `here` need the result. */
static void join_by_mailboxes(const Join *join, bool here, float *all)
{
    const float *x = join->x, *added = join->added;
    const int64_t rows = join->rows, total = join->total, *width = join->width;
    enum { MOST = PLACE_BYTES / sizeof(float) };
    int64_t widest = 1;
    for (int rank = 0; rank < ranks.ranks; rank++)
        widest = width[rank] > widest ? width[rank] : widest;
    const int64_t own = width[ranks.rank], some = widest < MOST ? MOST / widest : 1, most = widest < MOST ? widest : MOST;
    for (int64_t row = 0; row < rows; row += some)
        for (int64_t column = 0; column < widest; column += most) {
            const int64_t count = rows - row < some ? rows - row : some, start = now();
            int64_t first = row * total + column;
            const int64_t mine = own - column < 0 ? 0 : own - column < most ? own - column : most;
            publish(x + row * own + column, count * mine * sizeof *x);
            for (int rank = 0; rank < ranks.ranks; first += width[rank++]) {
                const int64_t left = width[rank] - column, size = left < 0 ? 0 : left < most ? left : most;
                const bool other = rank != ranks.rank;
                const float *part = other ? (const float *)published_by(rank, start, join->next) : x + row * own + column;
                if (here)
                    put_part(part, count, size, total, added == NULL ? NULL : added + first, all + first);
            }
        }
}

bool read_join(Run *run, size_t widths_at, size_t added_at, Join *join)
{
    Tensor x, widths, residual = {0};
    if (!input(run, 0, ORT_FLOAT, &x) || !input(run, widths_at, ORT_INT64, &widths)
        || (added_at && !input(run, added_at, ORT_FLOAT, &residual)))
        return false;
    const int64_t members = alone() ? widths.count : ranks.ranks;
    if (x.rank == 0 || widths.count != members || widths.count > MAX_RANKS)
        return fail(run, "satchel: the graph is for another number of ranks");
    *join = (Join){.x = x.data, .own = x.dims[x.rank - 1], .width = widths.data, .rank = x.rank, .added = residual.data};
    join->rows = x.count / (join->own ? join->own : 1);
    for (int rank = 0; rank < members; rank++)
        join->total += join->width[rank];
    if (join->rows * join->total > INT32_MAX || join->own > join->total
        || (!alone() && join->own != join->width[ranks.rank]))
        return fail(run, "satchel: a rank has another width than the graph says");
    memcpy(join->dims, x.dims, sizeof join->dims);
    join->dims[x.rank - 1] = join->total;
    if (residual.data != NULL && !has_dims(&residual, x.rank, join->dims))
        return fail(run, "satchel: the residual does not have the shape of the output");
    return true;
}

/* Joins the parts on all ranks, or on the first one of the group alone: then others have zeros. */
static bool join_parts(Run *run, const Join *join, bool everywhere, float *all)
{
    const int64_t rows = join->rows, total = join->total, *width = join->width, sent = rows * join->own;
    const float *added = join->added;
    if (alone()) {
        memset(all, 0, rows * total * sizeof *all);
        for (int64_t row = 0; row < rows; row++)
            memcpy(all + row * total, join->x + row * join->own, join->own * sizeof *all);
        for (int64_t i = 0; added != NULL && i < rows * total; i++)
            all[i] += added[i];
        return true;
    }
    const bool here = everywhere || ranks.rank == 0;
    const int64_t start = now();
    if (ranks.mailboxes != NULL) {
        join_by_mailboxes(join, here, all);
        if (!here)
            memset(all, 0, rows * total * sizeof *all);
        count(start, sent * sizeof *all);
        return true;
    }
    int counts[MAX_RANKS], starts[MAX_RANKS];
    Opaque request = {{0}};
    for (int64_t rank = 0, before = 0; rank < ranks.ranks; before += width[rank++]) {
        counts[rank] = (int)(rows * width[rank]);
        starts[rank] = (int)(rows * before);
    }
    float *received = !here || (rows == 1 && added == NULL) ? all : thread_scratch(OF_RUN, rows * total * sizeof *all);
    if (received == NULL)
        return fail(run, "satchel: out of memory for the parts of other ranks");
    const int error = everywhere ? ranks.all_gather(join->x, (int)sent, ranks.real, received, counts, starts, ranks.real,
                                                    ranks.group, &request)
                                 : ranks.gather(join->x, (int)sent, ranks.real, received, counts, starts, ranks.real, 0,
                                                ranks.group, &request);
    if (error || !wait_for(&request, start))
        return failed(run);
    count(start, sent * sizeof *all);
    if (!here)
        memset(all, 0, rows * total * sizeof *all);
    else if (received != all || added != NULL)
        for (int64_t rank = 0, first = 0; rank < ranks.ranks; first += width[rank++])
            put_part(received + starts[rank], rows, width[rank], total, added == NULL ? NULL : added + first, all + first);
    return true;
}

static bool run_gather(Run *run, bool everywhere)
{
    Join join;
    float *all;
    return read_join(run, 1, everywhere ? 2 : 0, &join) && output(run, 0, join.dims, join.rank, &all)
        && join_parts(run, &join, everywhere, all);
}

static bool run_all_gather(const void *kernel, Run *run)
{
    (void)kernel;
    return run_gather(run, true);
}

static bool run_gather_logits(const void *kernel, Run *run)
{
    (void)kernel;
    return run_gather(run, false);
}

/* With many rows each rank joins and rounds some of them, of all channels, and hands the others what it has rounded. */
enum { LEAST_OWN_ROWS = 16 };

/* Entries of some memory, `bytes` each, of which rank r has starts[r] to starts[r + 1]. */
typedef struct {
    char *data;
    int64_t bytes;
    const int64_t *starts;
} Shared;

/* Entries of a rank in piece number `piece`, of `most` each: the first and their number. */
static int64_t in_piece(const Shared *shared, int rank, int64_t piece, int64_t most, int64_t *first)
{
    const int64_t left = shared->starts[rank + 1] - (*first = shared->starts[rank] + piece * most);
    return left < 0 ? 0 : left < most ? left : most;
}

/* Gives each rank the entries of all others. */
static void hand_round(const Shared *shared, int kinds, int64_t most)
{
    const int64_t start = now();
    int64_t sent = 0, first, pieces = 0;
    for (int kind = 0; kind < kinds; kind++)
        for (int rank = 0; rank < ranks.ranks; rank++) {
            const int64_t own = shared[kind].starts[rank + 1] - shared[kind].starts[rank];
            pieces = (own + most - 1) / most > pieces ? (own + most - 1) / most : pieces;
        }
    for (int64_t piece = 0; piece < pieces; piece++) {
        char *place = open_place();
        for (int kind = 0; kind < kinds; kind++) {
            const int64_t bytes = shared[kind].bytes, size = in_piece(shared + kind, ranks.rank, piece, most, &first) * bytes;
            memcpy(place, shared[kind].data + first * bytes, size);
            place += size, sent += size;
        }
        publish_place();
        for (int rank = 0; rank < ranks.ranks; rank++) {
            if (rank == ranks.rank)
                continue;
            const char *theirs = published_by(rank, start, NOTHING);
            for (int kind = 0; kind < kinds; kind++) {
                const int64_t bytes = shared[kind].bytes, size = in_piece(shared + kind, rank, piece, most, &first) * bytes;
                memcpy(shared[kind].data + first * bytes, theirs, size);
                theirs += size;
            }
        }
    }
    count(start, sent);
}

/* Joins the rows of this rank only. A piece of a mailbox is what another rank gets. */
static void join_own_rows(const Join *join, const int64_t *starts, int64_t most, float *all)
{
    const Shared rows = {.starts = starts};
    const int64_t start = now(), own = join->own, total = join->total;
    int64_t longest = 0, sent = 0, first;
    for (int rank = 0; rank < ranks.ranks; rank++)
        longest = starts[rank + 1] - starts[rank] > longest ? starts[rank + 1] - starts[rank] : longest;
    for (int64_t piece = 0; piece * most < longest; piece++) {
        float *place = (float *)open_place();
        for (int rank = 0; rank < ranks.ranks; rank++) {
            if (rank == ranks.rank)
                continue;
            const int64_t size = in_piece(&rows, rank, piece, most, &first) * own;
            memcpy(place, join->x + first * own, size * sizeof *place);
            place += most * own, sent += size;
        }
        publish_place();
        const int64_t mine = in_piece(&rows, ranks.rank, piece, most, &first);
        for (int64_t rank = 0, column = first * total; rank < ranks.ranks; column += join->width[rank++]) {
            const int64_t width = join->width[rank], before = ranks.rank < rank ? ranks.rank : ranks.rank - 1;
            const float *part = rank == ranks.rank ? join->x + first * own
                                                   : (const float *)published_by((int)rank, start, NOTHING) + before * most * width;
            put_part(part, mine, width, total, join->added == NULL ? NULL : join->added + column, all + column);
        }
    }
    count(start, sent * sizeof *all);
}

/* Rows of a piece that another rank gets, or 0 if each rank joins all rows: there are few, or too long ones. */
static int64_t rows_of_piece(const Join *join)
{
    int64_t widest = 1;
    if (alone() || ranks.mailboxes == NULL || join->rows < LEAST_OWN_ROWS * ranks.ranks)
        return 0;
    for (int rank = 0; rank < ranks.ranks; rank++)
        widest = join->width[rank] > widest ? join->width[rank] : widest;
    return PLACE_BYTES / (int64_t)sizeof(float) / ((ranks.ranks > 2 ? ranks.ranks - 1 : 1) * widest);
}

/* Rounds the rows of this rank, and gets those of others. */
static bool round_own_rows(Run *run, const LinearParams *params, const LinearCall *call, bool whole, const int64_t *starts,
                           float *all, void *rounded)
{
    const int64_t values = row_bytes(&params->row), scales = 4 * row_scales(&params->row);
    const Rounded to = rounded_in(params, call->rows, rounded);
    int64_t places[MAX_RANKS + 1];
    const char *error
        = instructions->round(params, call, starts[ranks.rank], starts[ranks.rank + 1], rounded, &run->parallel);
    if (error != NULL)
        return fail(run, error);
    for (int rank = 0; rank <= ranks.ranks; rank++)
        places[rank] = instructions->places(params, call, starts[rank]);
    const Shared kinds[] = {{(char *)to.activations, values, places}, {(char *)to.scales, scales, places},
                            {(char *)to.sums, scales, places}};
    hand_round(kinds, 3, PLACE_BYTES / (values + 2 * scales));
    const Shared rows = {(char *)all, params->row.inputs * (int64_t)sizeof *all, starts};
    if (whole)
        hand_round(&rows, 1, PLACE_BYTES / rows.bytes);
    return true;
}

/* Whether each rank can quantize its columns of all rows: nothing else depends on whole rows than their largest magnitude. */
static bool has_own_columns(const Join *join, const LinearParams *params, const LinearCall *call)
{
    const RowParams *row = &params->row;
    bool fits = join->added == NULL && row->epsilon == 0 && row->block == 0 && params->bits == 8 && call->row_offsets == NULL
        && !call->single && join->rows * (int64_t)sizeof(float) <= PLACE_BYTES;
    for (int rank = 0; fits && row->hadamard > 0 && rank < ranks.ranks; rank++)
        fits = join->width[rank] % row->hadamard == 0;
    return fits;
}

/* The larger of two magnitudes, NaN beyond infinity: as integers they have this order. */
static float larger_magnitude(float a, float b)
{
    int32_t bits[2];
    memcpy(bits, (float[]){a, b}, sizeof bits);
    return bits[0] > bits[1] ? a : b;
}

/* Makes each row's largest magnitude that of all ranks' columns. */
static void share_magnitudes(float *largest, int64_t rows)
{
    const int64_t start = now(), bytes = rows * (int64_t)sizeof *largest;
    publish(largest, bytes);
    for (int rank = 0; rank < ranks.ranks; rank++) {
        if (rank == ranks.rank)
            continue;
        const float *theirs = (const float *)published_by(rank, start, NOTHING);
        for (int64_t row = 0; row < rows; row++)
            largest[row] = larger_magnitude(largest[row], theirs[row]);
    }
    count(start, bytes);
}

/* Copies `rows` pieces of `bytes` between memory with other distances. */
static void copy_columns(const char *from, int64_t from_stride, char *to, int64_t to_stride, int64_t rows, int64_t bytes)
{
    for (int64_t row = 0; row < rows; row++)
        memcpy(to + row * to_stride, from + row * from_stride, bytes);
}

/* Gives each rank the quantized columns of all others, `size` bytes each, and adds their sums to its own. A row takes
 * `places` places. */
static void hand_columns(const Join *join, Rounded to, int64_t stride, int64_t places, int64_t size)
{
    const int64_t start = now(), own = join->own * size;
    int64_t widest = 1, first[MAX_RANKS], sent = 0;
    for (int64_t rank = 0, before = 0; rank < ranks.ranks; before += join->width[rank++]) {
        widest = join->width[rank] > widest ? join->width[rank] : widest;
        first[rank] = before * size;
    }
    const int64_t some = PLACE_BYTES / (widest * size + (int64_t)sizeof *to.sums);
    for (int64_t row = 0; row < join->rows; row += some) {
        const int64_t rows = join->rows - row < some ? join->rows - row : some;
        char *values = (char *)to.activations + row * stride, *place = open_place();
        int32_t *sums = to.sums + row * places;
        copy_columns(values + first[ranks.rank], stride, place, own, rows, own);
        copy_columns((char *)sums, places * (int64_t)sizeof *sums, place + rows * own, sizeof *sums, rows, sizeof *sums);
        publish_place();
        sent += rows * (own + (int64_t)sizeof *sums);
        for (int rank = 0; rank < ranks.ranks; rank++) {
            if (rank == ranks.rank)
                continue;
            const int64_t bytes = join->width[rank] * size;
            const char *theirs = published_by(rank, start, NOTHING);
            copy_columns(theirs, bytes, values + first[rank], stride, rows, bytes);
            for (int64_t i = 0; i < rows; i++) {
                int32_t sum;
                memcpy(&sum, theirs + rows * bytes + i * (int64_t)sizeof sum, sizeof sum);
                sums[i * places] += sum;
            }
        }
    }
    count(start, sent);
}

/* Quantizes the columns of this rank, and gets those of others. */
static bool round_own_columns(Run *run, const Join *join, const LinearParams *params, const LinearCall *call, void *rounded)
{
    const int64_t rows = join->rows, places = instructions->places(params, call, 1), stride = row_bytes(&params->row) * places;
    const int64_t size = places, used = join->total * size; /* values of one byte take one place, words take two */
    Columns columns = {.rows = rows, .count = join->own, .x = join->x, .rounded = rounded};
    for (int rank = 0; rank < ranks.rank; rank++)
        columns.first += join->width[rank];
    const int64_t mixed = params->row.hadamard > 0 ? column_stride(&columns) : 0;
    columns.largest = thread_scratch(OF_RUN, (size_t)(rows * (1 + mixed) + 16) * sizeof *columns.largest);
    if (columns.largest == NULL)
        return fail(run, "satchel:Linear: out of memory");
    columns.mixed = columns.largest + (rows + 15) / 16 * 16;
    const Rounded to = rounded_in(params, rows, rounded);
    instructions->measure_columns(params, &columns, &run->parallel);
    share_magnitudes(columns.largest, rows);
    instructions->round_columns(params, &columns, &run->parallel);
    hand_columns(join, to, stride, places, size);
    for (int64_t row = 0; row < rows && used < stride; row++)
        memset(to.activations + row * stride + used, 0, stride - used);
    return true;
}

bool join_rounded(Run *run, const Join *join, const LinearParams *params, const LinearCall *call, Joined joined, float *all,
                  void *rounded)
{
    const int64_t most = rows_of_piece(join);
    if (most > 0 && joined == NO_ROWS && has_own_columns(join, params, call))
        return round_own_columns(run, join, params, call, rounded);
    if (most > 0 && join->total * (int64_t)sizeof *all <= PLACE_BYTES) {
        int64_t starts[MAX_RANKS + 1];
        for (int rank = 0; rank <= ranks.ranks; rank++)
            starts[rank] = join->rows * rank / ranks.ranks;
        join_own_rows(join, starts, most, all);
        return round_own_rows(run, params, call, joined == ALL_ROWS, starts, all, rounded);
    }
    Join streaming = *join;
    if (join->rows == 1)
        streaming.next = (Stream){(const char *)call->weights, panels(params) * panel_bytes(params)};
    if (!join_parts(run, &streaming, true, all))
        return false;
    const char *error = instructions->round(params, call, 0, join->rows, rounded, parallel_of(run, join->rows));
    return error == NULL || fail(run, error);
}

/* Of graphs of version 8 of the kernels: later ones let satchel:Linear do this. */
static bool run_rounded_gather(const void *kernel, Run *run)
{
    const LinearKernel *rounds = kernel;
    const RowParams *row = &rounds->params.row;
    Join join;
    Tensor norm_weight, offsets;
    float *all;
    void *rounded;
    if (!read_join(run, 1, 2, &join) || !input(run, 3, ORT_FLOAT, &norm_weight) || !input(run, 4, ORT_INT32, &offsets))
        return false;
    if (rounds->params.bits == 16 || join.total != row->inputs
        || (norm_weight.data != NULL && !has_dims(&norm_weight, 1, &row->inputs)))
        return fail(run, "satchel:RoundedGather: the input width differs from attribute inputs");
    const bool ragged = offsets.count > 0 && offsets.data != NULL;
    if (ragged && !splits(offsets.data, offsets.count - 1, join.rows))
        return fail(run, "satchel:RoundedGather: row_offsets do not ascend from 0 to the number of rows");
    const int64_t bytes = rounded_bytes(&rounds->params, join.rows);
    if (!output(run, 0, join.dims, join.rank, &all) || !output_of_any_type(run, 1, &bytes, 1, &rounded))
        return false;
    const LinearCall call = {.rows = join.rows,
                             .single = join.rank >= 2 && join.dims[join.rank - 2] == 1,
                             .row_offsets = ragged ? offsets.data : NULL,
                             .sequences = offsets.count - 1,
                             .x = all,
                             .norm_weight = norm_weight.data};
    return join_rounded(run, &join, &rounds->params, &call, rounds->joined, all, rounded);
}

enum { TO_NEXT = 77 };

typedef struct {
    int64_t width, each;
} StageParams;

static void *create_stage(Create *create)
{
    StageParams *params = malloc(sizeof *params);
    if (params == NULL) {
        create->error = "satchel: out of memory for an operator of a stage";
        return NULL;
    }
    params->width = attribute(create, "width", 0);
    params->each = attribute(create, "each", 0);
    if (params->width > 0)
        return params;
    free(params);
    create->error = "satchel: Send and Receive need the attribute width";
    return NULL;
}

/* What was sent last. MPI reads it until the request is complete, which the next one waits for: so this stage goes on
 * while the next one is busy. */
static struct {
    char *data;
    int64_t size;
    bool open;
    Opaque request;
} sent;

static bool send_to_next(Run *run, const Tensor *x)
{
    const int64_t bytes = x->count * sizeof(float), start = now();
    if (sent.open && !wait_for(&sent.request, start))
        return failed(run);
    sent.open = false;
    if (sent.size < bytes) {
        free(sent.data);
        sent.data = malloc(bytes);
        sent.size = sent.data == NULL ? 0 : bytes;
        if (sent.data == NULL)
            return fail(run, "satchel:Send: out of memory");
    }
    memcpy(sent.data, x->data, bytes);
    sent.request = (Opaque){{0}};
    if (ranks.send(sent.data, (int)x->count, ranks.real, ranks.next, TO_NEXT, ranks.world, &sent.request))
        return failed(run);
    sent.open = true;
    count(start, bytes);
    return true;
}

/* Sends x, [sequences, tokens, width], to the rank with the same part of the next stage. Of its result only the shape
 * means something, that of what the last stage computes: [rows of the second input, tokens or 1, width]. The runner of
 * the first rank receives that into it, so it is left as it is. */
static bool run_send(const void *kernel, Run *run)
{
    const StageParams *params = kernel;
    Tensor x, like;
    float *result;
    if (!input(run, 0, ORT_FLOAT, &x) || !input(run, 1, ORT_INT64, &like))
        return false;
    if (x.rank != 3 || like.rank == 0 || x.count > INT32_MAX)
        return fail(run, "satchel:Send: not [sequences, tokens, width]");
    const int64_t dims[] = {like.dims[0], params->each ? x.dims[1] : 1, params->width};
    if (!output(run, 0, dims, 3, &result))
        return false;
    if (!alone())
        return send_to_next(run, &x);
    const int64_t numbers = dims[0] * dims[1] * dims[2];
    for (int64_t i = 0; i < numbers; i++) /* a trial compares these */
        result[i] = x.count ? ((const float *)x.data)[x.count - 1 - i % x.count] : 0;
    return true;
}

/* What the stage before has sent for these tokens: [sequences, tokens, width]. */
static bool run_receive(const void *kernel, Run *run)
{
    const StageParams *params = kernel;
    Tensor ids;
    float *x;
    if (!input(run, 0, ORT_INT64, &ids))
        return false;
    if (ids.rank != 2 || ids.count * params->width > INT32_MAX)
        return fail(run, "satchel:Receive: not [sequences, tokens]");
    const int64_t dims[] = {ids.dims[0], ids.dims[1], params->width}, numbers = ids.count * params->width;
    if (!output(run, 0, dims, 3, &x))
        return false;
    if (alone()) { /* some numbers that depend on the token, for a trial */
        for (int64_t i = 0; i < numbers; i++)
            x[i] = sinf((float)(((const int64_t *)ids.data)[i / params->width] % 4096 + 7 * (i % params->width)));
        return true;
    }
    Opaque request = {{0}};
    const int64_t start = now();
    if (ranks.receive(x, (int)numbers, ranks.real, ranks.previous, TO_NEXT, ranks.world, &request)
        || !wait_for(&request, start))
        return failed(run);
    count(start, 0);
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

static const OrtElementType REDUCED[] = {ORT_FLOAT}, GATHERED[] = {ORT_FLOAT, ORT_INT64}, RECEIVED[] = {ORT_INT64};
static const OrtElementType JOINED[] = {ORT_FLOAT, ORT_INT64, ORT_FLOAT, ORT_FLOAT, ORT_INT32};
static const OrtElementType ROUNDED[] = {ORT_FLOAT, ORT_UINT8};

const Operator all_reduce_operator = {.name = "AllReduce",
                                      .inputs = 1,
                                      .required = 1,
                                      .outputs = 1,
                                      .input_types = REDUCED,
                                      .create = create_all_reduce,
                                      .run = run_all_reduce};
const Operator all_gather_operator = {.name = "AllGather",
                                      .inputs = 3,
                                      .required = 2,
                                      .outputs = 1,
                                      .input_types = JOINED,
                                      .create = create_gather,
                                      .run = run_all_gather};
const Operator rounded_gather_operator = {.name = "RoundedGather",
                                          .inputs = 5,
                                          .required = 2,
                                          .outputs = 2,
                                          .input_types = JOINED,
                                          .output_types = ROUNDED,
                                          .create = create_linear,
                                          .run = run_rounded_gather};
const Operator gather_logits_operator = {.name = "GatherLogits",
                                         .inputs = 2,
                                         .required = 2,
                                         .outputs = 1,
                                         .input_types = GATHERED,
                                         .create = create_gather,
                                         .run = run_gather_logits};
const Operator send_operator = {.name = "Send",
                                .inputs = 2,
                                .required = 2,
                                .outputs = 1,
                                .input_types = GATHERED,
                                .create = create_stage,
                                .run = run_send};
const Operator receive_operator = {.name = "Receive",
                                   .inputs = 1,
                                   .required = 1,
                                   .outputs = 1,
                                   .input_types = RECEIVED,
                                   .create = create_stage,
                                   .run = run_receive};

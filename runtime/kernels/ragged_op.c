/* satchel:Positions and satchel:LastToken: what depends on where a sequence's new tokens are in the row of all. */
#include <stdlib.h>
#include <string.h>

#include "operator.h"
#include "ragged.h"

/* Neither has attributes. */
static void *create(Create *create)
{
    void *kernel = malloc(1);
    if (kernel == NULL)
        create->error = "satchel: out of memory";
    return kernel;
}

/* The new tokens of each sequence: dense [batch, tokens], or ragged [1, tokens] with offsets. */
typedef struct {
    int64_t sequences, tokens;
    const int64_t *lengths; /* [sequences]: with the new tokens */
    const int32_t *offsets; /* NULL: each sequence has `tokens` */
} Rows;

static bool read_rows(Run *run, const Tensor *first, size_t index, Rows *rows)
{
    Tensor lengths, offsets;
    if (!input(run, index, ORT_INT64, &lengths) || !input(run, index + 1, ORT_INT32, &offsets))
        return false;
    if (first->data == NULL || first->rank < 2)
        return fail(run, "satchel: the new tokens are not [batch, tokens]");
    const bool ragged = offsets.count > 0 && offsets.data != NULL;
    rows->tokens = first->dims[1];
    rows->sequences = ragged ? offsets.count - 1 : first->dims[0];
    rows->offsets = ragged ? offsets.data : NULL;
    if (ragged && (first->dims[0] != 1 || !splits(offsets.data, rows->sequences, rows->tokens)))
        return fail(run, "satchel: row_offsets do not ascend from 0 to the number of new tokens");
    if (lengths.data == NULL || lengths.count != rows->sequences)
        return fail(run, "satchel: there is not one length for each sequence");
    rows->lengths = lengths.data;
    return true;
}

/* Positions of the new tokens: those of a ragged row end at its length; those of a dense row do too, or start at 0 where
 * the row is padded. `first`, where given, is added to those of each sequence. */
static bool run_positions(const void *kernel, Run *run)
{
    (void)kernel;
    Tensor ids, first;
    Rows rows;
    int64_t *y;
    if (!input(run, 0, ORT_INT64, &ids) || !input(run, 3, ORT_INT64, &first) || !read_rows(run, &ids, 1, &rows))
        return false;
    if (ids.rank != 2 || (first.data != NULL && first.count != rows.sequences))
        return fail(run, "satchel:Positions: the ids are not [batch, tokens], or there is not one start for each row");
    if (!output_of_any_type(run, 0, ids.dims, 2, (void **)&y))
        return false;
    for (int64_t row = 0; row < rows.sequences; row++) {
        const int64_t from = rows.offsets ? rows.offsets[row] : row * rows.tokens;
        const int64_t count = rows.offsets ? rows.offsets[row + 1] - from : rows.tokens;
        const int64_t past = rows.lengths[row] > count ? rows.lengths[row] - count : 0;
        for (int64_t i = 0; i < count; i++)
            y[from + i] = past + i + (first.data ? ((const int64_t *)first.data)[row] : 0);
    }
    return true;
}

/* The last token of each sequence that is not padding. */
static bool run_last(const void *kernel, Run *run)
{
    (void)kernel;
    Tensor x;
    Rows rows;
    float *y;
    if (!input(run, 0, ORT_FLOAT, &x) || !read_rows(run, &x, 1, &rows))
        return false;
    if (x.rank != 3)
        return fail(run, "satchel:LastToken: the input is not [batch, tokens, channels]");
    const int64_t dims[] = {rows.sequences, 1, x.dims[2]};
    if (!output(run, 0, dims, 3, &y))
        return false;
    for (int64_t row = 0; row < rows.sequences; row++) {
        const int64_t real = rows.lengths[row] < rows.tokens ? rows.lengths[row] : rows.tokens;
        if (real < 1)
            return fail(run, "satchel:LastToken: a sequence has no token");
        const int64_t at = rows.offsets ? rows.offsets[row + 1] - 1 : row * rows.tokens + real - 1;
        memcpy(y + row * x.dims[2], (const float *)x.data + at * x.dims[2], (size_t)x.dims[2] * sizeof(float));
    }
    return true;
}

static const OrtElementType POSITIONS_INPUTS[] = {ORT_INT64, ORT_INT64, ORT_INT32, ORT_INT64};
static const OrtElementType POSITIONS_OUTPUTS[] = {ORT_INT64};
static const OrtElementType LAST_INPUTS[] = {ORT_FLOAT, ORT_INT64, ORT_INT32};

const Operator positions_operator = {.name = "Positions",
                                     .inputs = 4,
                                     .required = 2,
                                     .outputs = 1,
                                     .input_types = POSITIONS_INPUTS,
                                     .output_types = POSITIONS_OUTPUTS,
                                     .create = create,
                                     .run = run_positions};
const Operator last_token_operator = {.name = "LastToken",
                                      .inputs = 3,
                                      .required = 2,
                                      .outputs = 1,
                                      .input_types = LAST_INPUTS,
                                      .create = create,
                                      .run = run_last};

/* What the custom operators share: their description, and access to tensors and attributes. */
#ifndef SATCHEL_OPERATOR_H
#define SATCHEL_OPERATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "abi.h"
#include "parallel.h"

enum { MAX_RANK = 6 };

/* A view of a tensor; `data` is NULL for an omitted optional input. */
typedef struct {
    void *data;
    int64_t dims[MAX_RANK], count;
    size_t rank;
    OrtElementType type;
} Tensor;

/* One run of an operator. A function that fails sets `error` to a constant string and returns false. */
typedef struct {
    const OrtApi *api;
    OrtKernelContext *context;
    const Tensor *constants; /* a node's inputs that never change; `data` is NULL for others */
    size_t inputs;           /* of the node */
    const char *error;
    size_t helpers;                /* threads that help with the work for one token (helpers.h) */
    Parallel parallel, contiguous; /* one task at a time to any free thread; or ranges of tasks, for the work for one token */
} Run;

/* How as many tokens are divided among threads. */
static inline const Parallel *parallel_of(const Run *run, int64_t tokens)
{
    return tokens == 1 ? &run->contiguous : &run->parallel;
}

typedef struct {
    const OrtApi *api;
    const OrtKernelInfo *info;
    const char *error;
} Create;

typedef struct {
    OrtCustomOp op; /* first member: ONNX Runtime passes a pointer to it */
    const char *name;
    size_t inputs, required, outputs, optional_outputs; /* the last ones are optional */
    const OrtElementType *input_types, *output_types; /* no output_types: float32 */
    void *(*create)(Create *create); /* NULL on failure */
    bool (*run)(const void *kernel, Run *run);
    size_t helpers; /* of the session */
} Operator;

extern const Operator linear_operator, table_linear_operator, attention_operator, recurrence_operator, convolution_operator;
extern const Operator attention_half_operator, attention_int8_operator, positions_operator, last_token_operator;
extern const Operator all_reduce_operator, all_gather_operator, rounded_gather_operator, gather_logits_operator;
extern const Operator send_operator, receive_operator;

int64_t attribute(Create *create, const char *name, int64_t fallback);
float attribute_float(Create *create, const char *name, float fallback);
/* Copies a string attribute, "" if absent. Returns false if it does not fit into `size` bytes. */
bool attribute_text(Create *create, const char *name, char *text, size_t size);

/* Reads an input of the given type, or of ORT_ANY; `data` is NULL if it is absent. */
bool input(Run *run, size_t index, OrtElementType type, Tensor *tensor);
/* Allocates an output, or gets the memory that the caller bound. */
bool output_of_any_type(Run *run, size_t index, const int64_t *dims, size_t rank, void **data);
/* The same of a float32 output. */
static inline bool output(Run *run, size_t index, const int64_t *dims, size_t rank, float **data)
{
    return output_of_any_type(run, index, dims, rank, (void **)data);
}
bool has_dims(const Tensor *tensor, size_t rank, const int64_t *dims);
bool fail(Run *run, const char *error);

#endif

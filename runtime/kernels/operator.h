/* What the operators of this library have in common: how one is described, and how it reads its tensors. */
#ifndef SATCHEL_OPERATOR_H
#define SATCHEL_OPERATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "abi.h"
#include "parallel.h"

enum { MAX_RANK = 6 };

/* A tensor whose data stay where they are; `data` NULL for an optional input that is not there. */
typedef struct {
    void *data;
    int64_t dims[MAX_RANK], count;
    size_t rank;
    OrtElementType type;
} Tensor;

/* One run of an operator. A function that fails says why in `error`, a text that stays, and returns false. */
typedef struct {
    const OrtApi *api;
    OrtKernelContext *context;
    const char *error;
    Parallel parallel, contiguous; /* tasks one at a time to whoever is free; or as many threads, a range of tasks each */
} Run;

typedef struct {
    const OrtApi *api;
    const OrtKernelInfo *info;
    const char *error;
} Create;

typedef struct {
    OrtCustomOp op; /* first, so that a pointer to it is one to the whole */
    const char *name;
    size_t inputs, required, outputs;
    const OrtElementType *input_types;
    void *(*create)(Create *create); /* NULL where it failed */
    bool (*run)(const void *kernel, Run *run);
} Operator;

extern Operator linear_operator, table_linear_operator, attention_operator;

int64_t attribute(Create *create, const char *name, int64_t otherwise);
float attribute_float(Create *create, const char *name, float otherwise);
/* Whether the text of an attribute, "" where it is not there, fits into `size` bytes. */
bool attribute_text(Create *create, const char *name, char *text, size_t size);

/* Read an input of the given type; where it is not there `data` is NULL. */
bool input(Run *run, size_t index, OrtElementType type, Tensor *tensor);
/* Make an output of type float32, or take the memory that the caller bound. */
bool output(Run *run, size_t index, const int64_t *dims, size_t rank, float **data);
bool has_dims(const Tensor *tensor, size_t rank, const int64_t *dims);
bool fail(Run *run, const char *error);

/* Memory of the calling thread, 64-byte aligned, that stays until the thread ends or asks for more; NULL without room. */
void *scratch(size_t bytes);

#endif

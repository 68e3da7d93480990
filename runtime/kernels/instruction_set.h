/* What is compiled once for each instruction set (isa/), and the choice among them. */
#ifndef SATCHEL_INSTRUCTION_SET_H
#define SATCHEL_INSTRUCTION_SET_H

#include <stddef.h>

#include "attention.h"
#include "convolution.h"
#include "linear.h"
#include "recurrence.h"
#include "rounding.h"
#include "table.h"

/* The kernels of one instruction set. Each returns NULL, or an error as a constant string. Results do not depend on the
 * number of threads, and are the same bits in all instruction sets, but for AMX's attention to several new tokens. */
typedef struct {
    const char *name;
    const char *(*linear)(const LinearParams *params, const LinearCall *call, const Parallel *parallel);
    /* Quantizes some rows of a call, from `first` on, into memory of rounded_bytes; of floats, prepares all. Their places there begin at that of
     * `first`; `places` says how many there are before a row. */
    const char *(*round)(const LinearParams *params, const LinearCall *call, int64_t first, int64_t end, void *rounded,
                         const Parallel *parallel);
    int64_t (*places)(const LinearParams *params, const LinearCall *call, int64_t row);
    void (*measure_columns)(const LinearParams *params, const Columns *columns, const Parallel *parallel); /* sets largest */
    void (*round_columns)(const LinearParams *params, const Columns *columns, const Parallel *parallel);
    const char *(*table)(const TableParams *params, const TableCall *call, const Parallel *parallel);
    /* Says what is wrong with a call; does not read the present or the output. Sets `scratch` to the bytes that
     * `attention` needs. */
    const char *(*attention_check)(const AttentionCall *call, size_t *scratch);
    /* Runs a step that attention_check accepted. `scratch` is aligned to 64 bytes. Results do not depend on where keys
     * and values lie, or on the other sequences. */
    const char *(*attention)(const AttentionCall *call, void *scratch, const Parallel *parallel);
    const char *(*recurrence)(const RecurrenceParams *params, const RecurrenceCall *call, const Parallel *parallel);
    void (*convolution)(const ConvolutionCall *call, const Parallel *parallel);
    void (*choose_scales)(const ScalesCall *call);
    void (*round_inputs)(const InputsCall *call);   /* as GPTQ does */
    void (*descend_inputs)(const InputsCall *call); /* each input in turn to the best with all others fixed */
} Instructions;

/* The chosen ones. NULL before the first choice. */
extern const Instructions *instructions;

/* The names of those that this processor announces, fastest first, then plain C; NULL after the last. */
const char *announced_instruction_set(size_t index);

/* Chooses by name, or the fastest that this processor has if `name` is NULL, and returns the name. Returns NULL, and
 * changes nothing, if this processor lacks it. Plain C is only chosen by name: ONNX Runtime's kernels are faster. */
const char *choose_instruction_set(const char *name);

#endif

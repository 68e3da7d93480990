/* Products of int8 activations with weights of 8 or 4 bits in panels of 16 outputs (docs/kernels.md). */
#ifndef SATCHEL_LINEAR_H
#define SATCHEL_LINEAR_H

#include <stdbool.h>
#include <stdint.h>

#include "parallel.h"
#include "rows.h"

typedef enum { GATE_NONE, GATE_SILU, GATE_GELU, GATE_GELU_TANH, GATE_RELU } Gate;

typedef struct {
    RowForm form; /* of the activations; its block is that of the weights */
    int64_t outputs;
    int bits;
    Gate gate;
} LinearForm;

typedef struct {
    int64_t rows;
    bool single;                /* each row is the only new token of its sequence */
    const float *x;             /* [rows, inputs] */
    const uint8_t *codes;       /* [panels, panel_bytes] */
    const float *scales;        /* [panels, blocks, 16] */
    const uint8_t *zero_points; /* the same, or NULL */
    const float *bias;          /* [outputs], or NULL */
    const float *residual;      /* as y, or NULL */
    const float *gain;          /* [inputs], or NULL */
    float *y;                   /* [rows, outputs], or half of them with a gate */
} LinearCall;

static inline int64_t half_outputs(const LinearForm *form) { return form->gate ? form->outputs / 2 : form->outputs; }
static inline int64_t panels(const LinearForm *form) { return (half_outputs(form) + 15) / 16 * (form->gate ? 2 : 1); }

static inline int64_t panel_bytes(const LinearForm *form)
{
    return form->bits == 4 ? form->form.inputs * 8 : (form->form.inputs + 3) / 4 * 64;
}

/* Returns NULL, or what went wrong. */
const char *linear_run(const LinearForm *form, const LinearCall *call, const Parallel *parallel);

#endif

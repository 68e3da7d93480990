/* Linear layers: activations of 8 or 16 bits with 8-bit or 4-bit weights, or of floats with halves, in panels of 16
 * outputs (docs/kernels.md). */
#ifndef SATCHEL_LINEAR_H
#define SATCHEL_LINEAR_H

#include <stdbool.h>
#include <stdint.h>

#include "parallel.h"
#include "rows.h"

typedef enum { GATE_NONE, GATE_SILU, GATE_GELU, GATE_GELU_TANH, GATE_RELU } Gate;

typedef struct {
    RowParams row; /* of the activations; weights have the same block */
    int64_t outputs;
    int bits;
    Gate gate;
    int64_t unread, unread_end; /* outputs that nothing reads, which need not be computed */
} LinearParams;

typedef struct {
    int64_t rows;
    bool single;                /* each row is the only new token of its sequence */
    const int32_t *row_offsets; /* [sequences + 1]: where each sequence's new tokens begin; NULL: `single` says all */
    int64_t sequences;
    const float *x;             /* [rows, inputs] */
    const uint8_t *weights;     /* [panels, panel_bytes] */
    const void *scales;         /* [panels, blocks, 16]: floats, or halves */
    bool half_scales;
    const uint8_t *zero_points; /* the same, or NULL */
    const float *bias;          /* [outputs], or NULL */
    const float *residual;      /* as y, or NULL */
    const float *norm_weight;   /* [inputs], or NULL */
    void *rounded;              /* its rows are quantized already, as Rounded says, or of floats, prepared; NULL: they are in x */
    int64_t first_panel, end_panel; /* those that a single row is multiplied by; end 0: all */
    float *y;                   /* [rows, outputs], or half of them with a gate */
} LinearCall;

static inline int64_t half_outputs(const LinearParams *params)
{
    return params->gate ? params->outputs / 2 : params->outputs;
}
static inline int64_t panels(const LinearParams *params)
{
    return (half_outputs(params) + 15) / 16 * (params->gate ? 2 : 1);
}

static inline int64_t end_panel(const LinearParams *params, const LinearCall *call)
{
    return call->end_panel > 0 ? call->end_panel : panels(params);
}

static inline int64_t panel_bytes(const LinearParams *params)
{
    const int64_t inputs = params->row.inputs;
    return params->bits == 16 ? inputs * 32 : params->bits == 4 ? inputs * 8 : (inputs + 3) / 4 * 64;
}

/* The quantized rows of a call. A row is in one place or in two, one after the other. */
typedef struct {
    int8_t *activations; /* [places, row_bytes] */
    float *scales;       /* [places, row_scales] */
    int32_t *sums;       /* the same */
} Rounded;

enum { PLACES_BEYOND = 16 }; /* a tile may read more of them than there are */

static inline Rounded rounded_in(const LinearParams *params, int64_t rows, void *memory)
{
    const int64_t places = 2 * rows, bytes = (places + PLACES_BEYOND) * row_bytes(&params->row);
    float *scales = (float *)((char *)memory + bytes);
    return (Rounded){memory, scales, (int32_t *)(scales + places * row_scales(&params->row))};
}

/* Bytes that Rounded needs for as many rows. */
static inline int64_t rounded_bytes(const LinearParams *params, int64_t rows)
{
    const int64_t places = 2 * rows;
    if (params->bits == 16)
        return rows * row_bytes(&params->row) * (int64_t)sizeof(float);
    return (places + PLACES_BEYOND) * row_bytes(&params->row) + 8 * places * row_scales(&params->row);
}

/* Some columns of rows that ranks quantize together, to 8 bits, with one scale for each row: each its own, after the largest
 * magnitudes of all are known. */
typedef struct {
    int64_t rows, first, count; /* columns `first` to `first` + `count` of each row */
    const float *x;             /* [rows, count] */
    float *mixed;               /* [rows, column_stride]: the Hadamard transforms, if the layer has one */
    float *largest;             /* [rows]: magnitudes */
    void *rounded;              /* all columns, as Rounded says */
} Columns;

static inline int64_t column_stride(const Columns *columns) { return (columns->count + 15) / 16 * 16; }

#endif

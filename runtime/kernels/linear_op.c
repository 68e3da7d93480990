/* satchel:Linear: reads what a node has, checks it, and multiplies. */
#include <stdlib.h>
#include <string.h>

#include "linear.h"
#include "operator.h"

enum { LARGEST = 1 << 24 };

static const char *const GATES[] = {"", "silu", "gelu", "gelu_tanh", "relu"};

static bool is_gate(LinearForm *form, const char *text)
{
    for (int i = 0; i < 5; i++)
        if (strcmp(text, GATES[i]) == 0) {
            form->gate = (Gate)i;
            return true;
        }
    return false;
}

static bool good_form(const LinearForm *form)
{
    const RowForm *row = &form->form;
    const int64_t k = row->inputs, n = form->outputs, block = row->block, mixed = row->hadamard;
    return k >= 1 && k <= LARGEST && n >= 1 && n <= LARGEST && (form->bits == 8 || form->bits == 4)
        && (block == 0 ? form->bits == 8 : block >= 8 && k % block == 0 && block % 8 == 0)
        && (mixed == 0 || (mixed >= 2 && (mixed & (mixed - 1)) == 0 && k % mixed == 0))
        && (form->gate == GATE_NONE || n % 2 == 0) && row->epsilon >= 0;
}

static void *create(Create *create)
{
    char text[16];
    LinearForm form = {0};
    form.form.inputs = attribute(create, "inputs", 0);
    form.form.block = attribute(create, "block", 0);
    form.form.hadamard = attribute(create, "hadamard", 0);
    form.form.epsilon = attribute_float(create, "epsilon", 0);
    form.outputs = attribute(create, "outputs", 0);
    form.bits = (int)attribute(create, "bits", 8);
    if (!attribute_text(create, "gate", text, sizeof text) || !is_gate(&form, text) || !good_form(&form)) {
        create->error = "satchel:Linear: its attributes do not go together";
        return NULL;
    }
    LinearForm *kernel = malloc(sizeof *kernel);
    if (kernel == NULL)
        create->error = "satchel:Linear: out of memory";
    else
        *kernel = form;
    return kernel;
}

static bool fits(const LinearForm *form, const Tensor *codes, const Tensor *scales, const Tensor *zero_points, const Tensor *bias, const Tensor *gain)
{
    const int64_t whole[] = {panels(form), panel_bytes(form)}, blocks[] = {panels(form), row_scales(&form->form), 16};
    return has_dims(codes, 2, whole) && has_dims(scales, 3, blocks)
        && (zero_points->data == NULL || (form->form.block && has_dims(zero_points, 3, blocks)))
        && (bias->data == NULL || has_dims(bias, 1, &form->outputs))
        && (gain->data == NULL || has_dims(gain, 1, &form->form.inputs));
}

static bool run(const void *kernel, Run *run)
{
    const LinearForm *form = kernel;
    Tensor x, codes, scales, zero_points, bias, residual, gain;
    if (!input(run, 0, ORT_FLOAT, &x) || !input(run, 1, ORT_UINT8, &codes) || !input(run, 2, ORT_FLOAT, &scales)
        || !input(run, 3, ORT_UINT8, &zero_points) || !input(run, 4, ORT_FLOAT, &bias)
        || !input(run, 5, ORT_FLOAT, &residual) || !input(run, 6, ORT_FLOAT, &gain))
        return false;
    if (x.rank == 0 || x.dims[x.rank - 1] != form->form.inputs)
        return fail(run, "satchel:Linear: its input does not have the width that the node says");
    if (!fits(form, &codes, &scales, &zero_points, &bias, &gain))
        return fail(run, "satchel:Linear: a weight does not have the shape that the node says");
    const int64_t rows = x.count / form->form.inputs;
    const bool single = x.rank >= 2 && x.dims[x.rank - 2] == 1;
    x.dims[x.rank - 1] = half_outputs(form);
    if (residual.data != NULL && !has_dims(&residual, x.rank, x.dims))
        return fail(run, "satchel:Linear: what is to be added does not have the shape of the result");
    LinearCall call = {rows, single, x.data, codes.data, scales.data, zero_points.data, bias.data, residual.data, gain.data, NULL};
    if (!output(run, 0, x.dims, x.rank, &call.y))
        return false;
    const char *error = linear_run(form, &call, rows == 1 ? &run->contiguous : &run->parallel);
    return error == NULL || fail(run, error);
}

static const OrtElementType INPUTS[] = {ORT_FLOAT, ORT_UINT8, ORT_FLOAT, ORT_UINT8, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT};

Operator linear_operator = {
    .name = "Linear", .inputs = 7, .required = 3, .outputs = 1, .input_types = INPUTS, .create = create, .run = run};

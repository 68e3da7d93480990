"""Outliers in the residual stream are spread over all its channels."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.channels import marked
from satchel.graphs.analysis.residual import EXPERT_INPUT, Norm, find_residual, vector
from satchel.graphs.analysis.rotations import rotation
from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.inputs import graph_input
from satchel.graphs.ir.low_rank import LowRank, carry
from satchel.graphs.ir.values import Builder, last_dim, nodes, only_user, replace, weight
from satchel.graphs.ir.weights import LazyWeight, from_array, left_multiplied, marked_like, right_multiplied, scaled
from satchel.runtime.bundle.contract import INPUT_IDS

MARK = "rotated"


@graph_pass
def rotate_residual(model: ir.Model, report: Report) -> None:
    """Rotate the residual stream by one orthogonal matrix R, which all that writes to it and reads it takes in.

    before: ids -> Gather(E) -> h -> RMSNormalization(g) -> MatMul(W) -> ... -> MatMul(V) -> Add(h)
    after:  ids -> Gather(E R) -> h R -> RMSNormalization(1) -> MatMul(R.T diag(g) W) -> ... -> MatMul(V R) -> Add(h R)
    A tied head keeps the table's bytes: one linear layer with R.T diag(g) R goes in front of it. A LayerNormalization
    is taken in by an R that keeps the mean; its bias goes into those of the linear layers behind it.
    refuses when: something writes to the stream that is not a lookup, linear layer or mixture of experts with constant
    weights (times a number, or one for each row); something reads it that is not a norm, or the norm that is not such
    a linear layer; or a weight is read elsewhere too. A lookup that is rotated already is left alone (silently).
    Source: SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024; QuaRot, Ashkboos et al. 2024, arXiv:2404.00456.
    """
    ids = graph_input(model, INPUT_IDS)
    for lookup in nodes(model, "Gather"):
        if lookup.inputs[1] is not ids or marked(lookup.inputs[0], MARK):
            continue
        with report.refusing(lookup):
            stream = find_residual(lookup)
            centered = any(norm.node.op_type == "LayerNormalization" for norm in stream.norms)
            matrix = rotation(stream.size, keeps_mean=centered)
            for value in stream.written:
                _swap(model, value, right_multiplied(_lazy(value), matrix, f"{value.name}.{MARK}"))
            for value in stream.experts:
                _swap(model, value, left_multiplied(_lazy(value), matrix.T, f"{value.name}.{MARK}"))
            for norm in stream.norms:
                _fold(model, norm, matrix)
            report.count += 1


def _lazy(value: ir.Value) -> LazyWeight:
    """The weight behind an initializer of which the search has shown that it is there."""
    lazy = weight(value) or vector(value, last_dim(value) or 0)
    if lazy is None:
        raise TypeError(f"{value.name} is not a constant weight")
    return lazy


def _swap(model: ir.Model, old: ir.Value, lazy: LazyWeight) -> None:
    replace(old, Builder(model).initializer(lazy))


def _fold(model: ir.Model, norm: Norm, matrix: np.ndarray) -> None:
    """Move the norm's weight and bias, and the rotation back, into the linear layers behind it."""
    for reader in norm.readers:
        if reader.op_type == "FusedMatMul":
            _rotate_before_head(model, reader, norm, matrix)
            continue
        value = reader.inputs[EXPERT_INPUT if reader.op_type == "MoE" else 1]
        if value is None:
            continue
        lazy, name = _lazy(value), f"{value.name}.{MARK}"
        if reader.op_type == "MatMul":
            if norm.bias is not None:
                _move_bias(model, reader, norm.bias, lazy)
                lazy = _with_moved_bias(lazy, norm.bias)
            _swap(model, value, left_multiplied(scaled(lazy, norm.gain, name), matrix.T, name))
        else:  # Gemm with transB and MoE hold their matrices as [.., out, in]
            _swap(model, value, right_multiplied(scaled(lazy, norm.gain, name, axis=-1), matrix, name))
    size = len(matrix)
    ones = model.graph.initializers.get(f"ones.{size}") or Builder(model).initializer(
        from_array(f"ones.{size}", np.ones(size, np.float32), computed=True)
    )
    norm.node.resize_inputs(2)
    norm.node.replace_input_with(1, ones)


def _rotate_before_head(model: ir.Model, head: ir.Node, norm: Norm, matrix: np.ndarray) -> None:
    """logits = norm(h) diag(g) E.T = norm(h R) (R.T diag(g) R) (E R).T; a bias b of the norm becomes b R."""
    x = head.inputs[0]
    builder, name = Builder(model, head), f"{norm.gain.name.removesuffix('.weight')}.rotation"
    back = from_array(f"{name}.back", np.ascontiguousarray(matrix.T), computed=True)
    gain = right_multiplied(scaled(back, norm.gain, name, axis=-1), matrix, f"{name}.weight.T")
    turned = builder.value("MatMul", [x, builder.initializer(gain)], name, x)
    if norm.bias is not None:
        bias = builder.initializer(right_multiplied(norm.bias, matrix, f"{name}.bias"))
        turned = builder.value("Add", [turned, bias], f"{name}.biased", x)
    head.replace_input_with(0, turned)


def _move_bias(model: ir.Model, product: ir.Node, bias: LazyWeight, matrix: LazyWeight) -> None:
    """Let the norm's bias times the matrix be added behind the linear layer: in its own bias where it has one."""
    output = product.outputs[0]
    add = only_user(output)
    old = next((v for v in add.inputs if v is not output), None) if add is not None and add.op_type == "Add" else None
    more = vector(old, matrix.dims[1])
    if old is not None and more is not None and only_user(old) is add:
        _swap(model, old, _times(bias, matrix, f"{old.name}.{MARK}", more))
        return
    following = [*model.graph, None]
    builder = Builder(model, following[following.index(product) + 1])
    moved = builder.initializer(_times(bias, matrix, f"{product.name}.norm_bias"))
    biased = builder.value("Add", [output, moved], f"{product.name}.norm_biased", output)
    replace(output, biased)
    builder.graph.node(f"{product.name}.norm_biased").replace_input_with(0, output)  # it read its own result


def _with_moved_bias(matrix: LazyWeight, bias: LazyWeight) -> LazyWeight:
    """The matrix, whose adapters add what they make of the norm's bias as well."""
    same = LazyWeight(matrix.name, matrix.dims, matrix.dtype, matrix.rows, matrix.columns, computed=matrix.computed)

    def moved(change: LowRank) -> LowRank:
        def rows(start: int, stop: int) -> np.ndarray:
            total = bias.numpy()[None] @ change.first.numpy() @ change.second.numpy()
            if change.gain is not None:  # what the base makes of the bias is added without the gain
                total += (change.gain.numpy() - 1) * (bias.numpy() @ matrix.numpy())
            return np.asarray(total + (0 if change.bias is None else change.bias.numpy()), np.float32)

        wide = (1, change.second.dims[1])
        return dataclasses.replace(change, bias=LazyWeight(matrix.name, wide, change.second.dtype, rows))

    return marked_like(carry(same, matrix, lambda change: change.each(moved)), matrix)


def _times(bias: LazyWeight, matrix: LazyWeight, name: str, more: LazyWeight | None = None) -> LazyWeight:
    """bias [in] @ matrix [in, out] + more [out]; any part of it reads all of the matrix."""

    def rows(start: int, stop: int) -> np.ndarray:
        total = bias.numpy() @ matrix.numpy() + (0 if more is None else more.numpy())
        return np.asarray(total[start:stop], matrix.dtype.numpy())

    return LazyWeight(name, matrix.dims[1:], matrix.dtype, rows)

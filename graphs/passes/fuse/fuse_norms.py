"""Norms written as arithmetic -> one operator each."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import (
    Builder,
    attributes,
    last_dim,
    nodes,
    only_user,
    producer,
    rank,
    replace,
    scalar,
    split_operand,
    square,
    weight,
)
from satchel.graphs.ir.weights import from_array


@dataclasses.dataclass(frozen=True)
class Norm:
    """A matched norm: `value` = scale * x / sqrt(mean(x * x) + epsilon)."""

    x: ir.Value
    scale: ir.Value | None
    epsilon: float
    value: ir.Value


@graph_pass
def fuse_norms(model: ir.Model, report: Report) -> None:
    """Fuse root-mean-square norms, and layer norms built on the same arithmetic.

    before: x -> Pow(2) -> ReduceMean(-1) -> Add(eps) -> Sqrt -> Reciprocal -> Mul(x) -> Mul(scale) -> y
    after:  x -> RMSNormalization(scale, eps) -> y
    before: x -> Sub(ReduceMean(x, -1)) -> RMSNormalization(scale, eps) -> y
    after:  x -> LayerNormalization(scale, eps) -> y
    refuses when: the mean is not over the last axis alone with the dimension kept, or an attribute is not known. A
    scale that is not one
    vector over the last axis stays a Mul after the norm.
    Source: RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467; ONNX operator set 23.
    """
    for reciprocal in nodes(model, "Reciprocal"):
        _fuse(model, reciprocal, report)
    for node in nodes(model, "RMSNormalization"):
        _fuse_layer_norm(model, node, report)


def _fuse(model: ir.Model, reciprocal: ir.Node, report: Report) -> None:
    with report.refusing(reciprocal):
        norm = _match(reciprocal)
        if norm is None:
            return
        end = norm.value.producer()
        if end is None:
            return
        builder = Builder(model, end)
        scale = norm.scale
        if scale is None:
            width = last_dim(norm.x)
            if width is None:
                report.refuse(reciprocal, "the width of the norm is not known")
                return
            name = f"ones.{width}"
            ones = from_array(name, np.ones(width, np.float32), computed=True)
            scale = model.graph.initializers.get(name) or builder.initializer(ones)
        fused = builder.value(
            "RMSNormalization", [norm.x, scale], f"{norm.value.name}.norm", norm.value, axis=-1, epsilon=norm.epsilon
        )
        replace(norm.value, fused)
        report.count += 1


def _match(reciprocal: ir.Node) -> Norm | None:
    sqrt = producer(reciprocal.inputs[0], "Sqrt")
    add = producer(sqrt.inputs[0], "Add") if sqrt else None
    split = split_operand(add, "ReduceMean") if add else None
    if split is None:
        return None
    mean, epsilon_value = split
    epsilon = scalar(epsilon_value)
    squared = square(mean.inputs[0])
    x = squared.inputs[0] if squared is not None else None
    if epsilon is None or x is None:
        return None
    _check_mean(mean)
    product = only_user(reciprocal.outputs[0])
    if product is None or product.op_type != "Mul" or x not in product.inputs:
        return None
    value, scale = product.outputs[0], None
    following = only_user(value)
    if following is not None and following.op_type == "Mul":
        other = next(v for v in following.inputs if v is not value)
        if rank(other) == 1 and weight(other) is not None and last_dim(other) == last_dim(x):
            value, scale = following.outputs[0], other
    return Norm(x, scale, epsilon, value)


def _check_mean(mean: ir.Node) -> None:
    """Refuse a ReduceMean that is not over the last axis alone with the dimension kept."""
    options = attributes(mean, keepdims=1, noop_with_empty_axes=0)
    axis = scalar(mean.inputs[1]) if len(mean.inputs) > 1 else None
    ndim = rank(mean.inputs[0])
    if options["keepdims"] != 1 or axis is None or (axis != -1 and (ndim is None or axis != ndim - 1)):
        raise Refused("the mean is not over the last axis alone with the dimension kept")


def _fuse_layer_norm(model: ir.Model, node: ir.Node, report: Report) -> None:
    subtract = producer(node.inputs[0], "Sub")
    mean = producer(subtract.inputs[1], "ReduceMean") if subtract else None
    if subtract is None or mean is None or mean.inputs[0] is not subtract.inputs[0]:
        return
    with report.refusing(node):
        _check_mean(mean)
        options = attributes(node, axis=-1, epsilon=1e-5)
        if options["axis"] != -1 and options["axis"] != (rank(subtract.inputs[0]) or 0) - 1:
            raise Refused("the norm is not over the last axis alone")
        fused = Builder(model, node).value(
            "LayerNormalization", [subtract.inputs[0], node.inputs[1]], f"{node.name}.layer", node.outputs[0], **options
        )
        replace(node.outputs[0], fused)
        report.count += 1

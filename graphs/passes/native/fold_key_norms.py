"""The norms of queries and keys of a recurrence go into satchel's own operator."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import INTERNAL, constant, dims, nodes, only_user, producer, scalar, split_operand

TOLERANCE = 1e-6
"""Relative, of a factor that float32 holds rounded."""


@graph_pass
def fold_key_norms(model: ir.Model, report: Report) -> None:
    """Let a recurrence read query, key and value from one value, and normalize queries and keys itself.

    before: x -> Split -> query -> Reshape -> RMSNormalization(ones) -> Reshape -> satchel::LinearAttention -> y
                       -> key -> Reshape -> RMSNormalization(ones) -> Mul(1 / sqrt(n)) -> Reshape ->
                       -> value ->
    after:  x -> satchel::LinearAttention(epsilon) -> y
    refuses when: queries and keys are normalized otherwise, or something else reads one of these values. What has no
    such norms is left alone (silently).
    """
    for node in nodes(model, "LinearAttention", INTERNAL):
        query, key = _normed(node.inputs[0]), _normed(node.inputs[1])
        if query is None or key is None:
            continue
        with report.refusing(node):
            _fold(node, query, key)
            report.count += 1


@dataclasses.dataclass(frozen=True)
class Normed:
    """x / sqrt(mean of x^2 + epsilon) * factor, over the last `width` channels of `source`."""

    source: ir.Value
    epsilon: float
    width: int
    factor: float


def _normed(value: ir.Value | None) -> Normed | None:
    flat = producer(value, "Reshape")
    if flat is None or flat.inputs[0] is None:
        return None
    normed, factor = flat.inputs[0], 1.0
    product = producer(normed, "Mul")
    found = split_operand(product, "RMSNormalization") if product is not None else None
    if found is not None:
        share = scalar(found[1])
        if share is None:
            return None
        normed, factor = found[0].outputs[0], share
    norm = producer(normed, "RMSNormalization")
    apart = producer(norm.inputs[0], "Reshape") if norm is not None else None
    if norm is None or apart is None or apart.inputs[0] is None:
        return None
    ones, shape = constant(norm.inputs[1]), dims(norm.inputs[0])
    width = shape[-1] if shape else None
    if ones is None or not isinstance(width, int) or ones.shape != (width,) or not np.all(ones == 1):
        return None
    return Normed(apart.inputs[0], norm.attributes.get_float("epsilon", 1e-5), width, factor)


def _fold(node: ir.Node, query: Normed, key: Normed) -> None:
    split = producer(query.source, "Split")
    if split is None or [query.source, key.source, node.inputs[2]] != list(split.outputs) or split.inputs[0] is None:
        raise Refused("query, key and value are not the three parts of one value")
    if any(only_user(value) is None for value in split.outputs):
        raise Refused("its query, key or value is read by something else too")
    if (query.epsilon, query.width) != (key.epsilon, key.width):
        raise Refused("queries and keys have different norms")
    root = math.sqrt(key.width)
    if abs(key.factor * root - 1) > TOLERANCE:
        raise Refused(f"its keys are {key.factor * root:.6g} long")
    scale = node.attributes.get_float("scale", 0.0) * query.factor * root
    node.attributes.add(ir.AttrFloat32("scale", scale))
    node.attributes.add(ir.AttrFloat32("epsilon", query.epsilon * query.width))
    node.replace_input_with(0, split.inputs[0])
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)

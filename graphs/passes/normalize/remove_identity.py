"""Drop nodes that change nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import constant, dims, producer, replace

END = np.iinfo(np.int64).max


@graph_pass
def remove_identity(model: ir.Model, report: Report) -> None:
    """Drop Identity, casts to the same type, slices of everything, reshapes and expansions to the same shape,
    joins with nothing, and pairs of moves that undo each other.

    before: x -> Slice(all) -> Cast(same) -> Transpose(p) -> Transpose(p inverted) -> y
    after:  x -> y
    Reshape after Reshape becomes one Reshape. refuses when: shapes or types are not known (silently: such a node is
    right as it is).
    """
    for node in list(model.graph):
        rule = RULES.get(node.op_type) if node.domain == "" else None
        if rule is None:
            continue
        if node.op_type == "Reshape" and _merge_reshapes(node):
            report.count += 1
        source = rule(node)
        if source is None or (
            node.outputs[0].is_graph_output()
            and (source.is_graph_input() or source.is_initializer() or source.is_graph_output())
        ):
            continue
        replace(node.outputs[0], source)
        report.count += 1


def _identity(node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _cast(node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    known = source is not None and source.dtype is not None
    return source if known and source.dtype == node.attributes["to"].value else None  # type: ignore[union-attr]


def _cast_like(node: ir.Node) -> ir.Value | None:
    source, like = node.inputs
    known = source is not None and like is not None and source.dtype is not None
    return source if known and source.dtype == like.dtype else None  # type: ignore[union-attr]


def _slice(node: ir.Node) -> ir.Value | None:
    starts, ends = constant(node.inputs[1]), constant(node.inputs[2])
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1, np.int64)
    if steps is None or (steps != 1).any():
        return None
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    everything = starts is not None and ends is not None and not starts.any() and (ends == END).all()
    same = before is not None and before == after and None not in before  # from wherever: as many are left
    return node.inputs[0] if everything or same else None


def _reshape(node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    before, after = dims(source), dims(node.outputs[0])
    if before is not None and before == after and None not in before:
        return source
    inner = producer(source, "Reshape")
    if inner is not None and dims(inner.inputs[0]) == after and after is not None and None not in after:
        return inner.inputs[0]
    return None


def _merge_reshapes(node: ir.Node) -> bool:
    inner = producer(node.inputs[0], "Reshape")
    if inner is None or inner.inputs[0] is None or node.attributes or inner.attributes:
        return False
    target, inner_target = constant(node.inputs[1]), constant(inner.inputs[1])
    # The zeros of the outer target must mean the same dimensions of the inner input.
    keeps = target is not None and inner_target is not None and all(
        t != 0 or (i < len(inner_target) and inner_target[i] == 0) for i, t in enumerate(target)
    )  # fmt: skip
    if keeps:
        node.replace_input_with(0, inner.inputs[0])
    return bool(keeps)


def _transpose(node: ir.Node) -> ir.Value | None:
    perm = node.attributes["perm"].value if "perm" in node.attributes else None
    if perm is not None and list(perm) == list(range(len(perm))):
        return node.inputs[0]
    inner = producer(node.inputs[0], "Transpose")
    if inner is None or perm is None or "perm" not in inner.attributes:
        return None
    first = inner.attributes["perm"].value
    return inner.inputs[0] if [first[p] for p in perm] == list(range(len(perm))) else None


def _concat(node: ir.Node) -> ir.Value | None:
    """The only operand, or one beside others that are empty along the axis."""
    if len(node.inputs) == 1:
        return node.inputs[0]
    axis = node.attributes["axis"].value
    shapes = [dims(v) for v in node.inputs]
    if any(s is None for s in shapes):
        return None
    full = [v for v, s in zip(node.inputs, shapes, strict=True) if s is not None and s[axis] != 0]
    return full[0] if len(full) == 1 else None


def _gather(node: ir.Node) -> ir.Value | None:
    """One of the copies that an Expand made along a new first axis, through a Slice of them."""
    data, index = node.inputs
    if node.attributes.get_int("axis", 0) != 0 or (array := constant(index)) is None or array.ndim:
        return None
    cut = producer(data, "Slice")
    axes = constant(cut.inputs[3]) if cut is not None and len(cut.inputs) > 3 else None
    copies = cut.inputs[0] if cut is not None and axes is not None and axes.tolist() == [0] else data
    expand = producer(copies, "Expand")
    unsqueeze = producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    source = unsqueeze.inputs[0] if unsqueeze is not None else None
    new = constant(unsqueeze.inputs[1]) if unsqueeze is not None else None
    if source is None or new is None or new.tolist() != [0]:
        return None
    return source if dims(source) is not None and dims(source) == dims(node.outputs[0]) else None


def _alone(node: ir.Node) -> ir.Value | None:
    """The only operand of an operator that takes any number of them."""
    return node.inputs[0] if len(node.inputs) == 1 else None


def _expand(node: ir.Node) -> ir.Value | None:
    """What is expanded to its own shape."""
    shape = producer(node.inputs[1], "Shape")
    if shape is None or shape.inputs[0] is not node.inputs[0] or "end" in shape.attributes:
        return None
    return node.inputs[0] if shape.attributes.get_int("start", 0) == 0 else None


RULES: dict[str, Callable[[ir.Node], ir.Value | None]] = {
    "Identity": _identity,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Slice": _slice,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "Max": _alone,
    "Min": _alone,
    "Sum": _alone,
}
"""For each operator: the value that its output equals, or None."""

"""Rotary position embeddings written as arithmetic -> RotaryEmbedding."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import (
    Builder,
    attributes,
    dims,
    last_dim,
    nodes,
    producer,
    rank,
    replace,
    scalar,
    span,
    weight,
)
from satchel.graphs.ir.weights import LazyWeight, from_array


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A matched rotation of the first `width` channels of x [batch, heads, sequence, head_dim]."""

    x: ir.Value
    width: int
    interleaved: bool
    cos: LazyWeight
    sin: LazyWeight
    positions: ir.Value
    value: ir.Value


@graph_pass
def fuse_rotary(model: ir.Model, report: Report) -> None:
    """Fuse the rotation of queries or keys by tables that are looked up by position.

    before: x -> Mul(Unsqueeze(Gather(cos, position))) \\
            x -> Slice, Slice, Neg, Concat -> Mul(Unsqueeze(Gather(sin, position))) -> Add -> y      (halves; pairs with
            step-2 slices)
    after:  x -> RotaryEmbedding(cos[:, half], sin[:, half], position) -> y
    A rotation of the first channels only (Slice, rotate, Concat with the rest) becomes one node with
    rotary_embedding_dim.
    refuses when: the tables of the two halves (or of a pair's two channels) differ, or slices do not meet in the
    middle.
    Source: RoFormer, Su et al. 2021, arXiv:2104.09864; ONNX operator set 23.
    """
    for add in nodes(model, "Add"):
        with report.refusing(add):
            rotation = _match(add)
            if rotation is not None:
                _rewrite(model, _widen(rotation))
                report.count += 1


def _match(add: ir.Node) -> Rotation | None:
    plain, turned = (producer(value, "Mul") for value in add.inputs)
    if plain is None or turned is None:
        return None
    for first, second in ((plain, turned), (turned, plain)):
        cosine, sine = _table_operand(first), _table_operand(second)
        if cosine is None or sine is None:
            continue
        (x, cos, positions), (rotated, sin, other_positions) = cosine, sine
        interleaved = _rotated_kind(rotated, x)
        if interleaved is not None and positions is other_positions:
            width = last_dim(x)
            if width is None:
                raise Refused("the number of rotated channels is not known")
            return Rotation(x, width, interleaved, cos, sin, positions, add.outputs[0])
    return None


def _table_operand(mul: ir.Node) -> tuple[ir.Value, LazyWeight, ir.Value] | None:
    """(the other operand, the table, the positions) where one operand is Unsqueeze(Gather(table, positions), 1)."""
    for index, value in enumerate(mul.inputs):
        unsqueeze = producer(value, "Unsqueeze")
        gather = producer(unsqueeze.inputs[0], "Gather") if unsqueeze else None
        other = mul.inputs[1 - index]
        if unsqueeze is None or gather is None or other is None:
            continue
        table, positions = weight(gather.inputs[0]), gather.inputs[1]
        if table is None or positions is None or len(table.dims) != 2 or attributes(gather, axis=0)["axis"] != 0:
            continue
        if rank(positions) != 2:
            raise Refused("the positions are not [batch, sequence]")
        if scalar(unsqueeze.inputs[1]) not in (1, -3):
            raise Refused("the tables are not spread over the head axis of [batch, heads, sequence, head_dim]")
        return other, table, positions
    return None


def _rotated_kind(rotated: ir.Value, x: ir.Value) -> bool | None:
    """Which channels of `x` rotate together, if `rotated` is its rotation by a right angle.

    False: the halves, concat(-x[half:], x[:half]). True: the pairs, (-x[1], x[0], -x[3], x[2], ...). None: neither.
    """
    width = last_dim(x)
    if width is None:
        return None
    concat = producer(rotated, "Concat")
    if concat is not None and len(concat.inputs) == 2 and concat.attributes["axis"].value in (-1, 3):
        negative, low = producer(concat.inputs[0], "Neg"), _channels(concat.inputs[1], x)
        high = _channels(negative.inputs[0], x) if negative else None
        if high is None or low is None:
            return None
        if (low, high) != (range(width // 2), range(width // 2, width)):
            raise Refused(f"the rotated halves are {low} and {high} of {width} channels")
        return False
    reshape = producer(rotated, "Reshape")
    concat = producer(reshape.inputs[0], "Concat") if reshape else None
    parts = [producer(value, "Unsqueeze") for value in concat.inputs] if concat else []
    if concat is None or reshape is None or len(parts) != 2 or parts[0] is None or parts[1] is None:
        return None
    spread = [concat.attributes["axis"].value, *(scalar(p.inputs[1]) for p in parts if p is not None)]
    if any(axis not in (-1, 4) for axis in spread) or dims(reshape.outputs[0]) != dims(x):
        raise Refused("the two channels of a pair are not laid side by side")
    negative = producer(parts[0].inputs[0], "Neg")
    odd, even = (_channels(negative.inputs[0], x) if negative else None), _channels(parts[1].inputs[0], x)
    if odd is None or even is None:
        return None
    if (even, odd) != (range(0, width, 2), range(1, width, 2)):
        raise Refused(f"the rotated pairs are {even} and {odd} of {width} channels")
    return True


def _channels(value: ir.Value | None, x: ir.Value) -> range | None:
    """Which channels of the last axis of `x` the value holds, if it is cut out of it."""
    found = span(value)
    return found[1] if found is not None and found[0] is x else None


def _widen(rotation: Rotation) -> Rotation:
    """Take in a Slice before and a Concat after that pass the unrotated channels by."""
    width = last_dim(rotation.x)
    cut = rotation.x.producer()
    source = cut.inputs[0] if cut is not None and cut.op_type in ("Slice", "Split") and cut.inputs else None
    joins = [use.node for use in rotation.value.uses() if use.node.op_type == "Concat" and use.node.domain == ""]
    if source is None or len(joins) != 1 or len(rotation.value.uses()) != 1 or len(joins[0].inputs) != 2:
        return rotation
    whole, first, rest = last_dim(source), _channels(rotation.x, source), _channels(joins[0].inputs[1], source)
    if (
        joins[0].attributes["axis"].value not in (-1, 3)
        or whole is None
        or (first, rest) != (range(width or 0), range(width or 0, whole))
    ):
        return rotation
    return dataclasses.replace(rotation, x=source, value=joins[0].outputs[0])


def _rewrite(model: ir.Model, rotation: Rotation) -> None:
    end = rotation.value.producer()
    shape = dims(rotation.x)
    if end is None or shape is None or len(shape) != 4:
        raise Refused("the rotated value is not [batch, heads, sequence, head_dim]")
    halves = [(_cache_name(table, rotation), table) for table in (rotation.cos, rotation.sin)]
    missing = {name: _half(table, rotation) for name, table in halves if name not in model.graph.initializers}
    builder = Builder(model, end)
    for name, half in missing.items():
        builder.initializer(from_array(name, half, computed=True))
    caches = [model.graph.initializers[name] for name, _ in halves]
    partial = rotation.width if rotation.width != last_dim(rotation.x) else 0
    fused = builder.value(
        "RotaryEmbedding", [rotation.x, *caches, rotation.positions], f"{rotation.value.name}.rotary", rotation.value,
        interleaved=int(rotation.interleaved), rotary_embedding_dim=partial,
    )  # fmt: skip
    replace(rotation.value, fused)


def _cache_name(table: LazyWeight, rotation: Rotation) -> str:
    return f"{table.name}.{'pairs' if rotation.interleaved else 'halves'}"


def _half(table: LazyWeight, rotation: Rotation) -> np.ndarray:
    """The table's half that RotaryEmbedding wants, [positions, width / 2]; both halves must be the same."""
    array, half = table.numpy(), rotation.width // 2
    first, second = (array[:, 0::2], array[:, 1::2]) if rotation.interleaved else (array[:, :half], array[:, half:])
    if array.shape[1] != rotation.width or not np.array_equal(first, second):
        raise Refused(f"the table {table.name} is not the same for the two channels that rotate together")
    return np.ascontiguousarray(first)

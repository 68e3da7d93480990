"""Finds and adds inputs and outputs of a model's graph by the contract that all bundles follow."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import onnx_ir as ir

from satchel.graphs.ir.values import producer, scalar
from satchel.graphs.ir.weights import LazyWeight, cast
from satchel.runtime.bundle.contract import (
    ATTENTION_MASK,
    BATCH,
    CAPACITY,
    INPUT_IDS,
    POSITION_IDS,
    SEQUENCE,
    TOTAL,
    past_names,
    past_state_name,
    present_names,
    present_state_name,
)

POSITIONS = "positions"
"""The value that derive_positions puts in the place of the input `position_ids`."""

ROTARY_ROWS = "rotary.rows"
"""How the nodes begin by whose names choose_rotary_rows adds the first row of a block to positions."""

TABLE = "table"
"""Mark (`meta`) of an input that takes one row of a lookup table for each token: the table, a `LazyWeight`."""

WINDOW = "window"
"""Mark (`meta`) of an attention mask: the sliding window of the layers that read it, 0 for none."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The numbers that stand for the dimensions `sequence` and `capacity` in a graph of static shapes."""

    tokens: int
    capacity: int


def graph_input(model: ir.Model, name: str) -> ir.Value:
    """The graph input of that name.

    Raises:
        KeyError: There is none.
    """
    for value in model.graph.inputs:
        if value.name == name:
            return value
    raise KeyError(name)


def static_input(model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """The graph input of that name, added if it does not exist yet.

    Raises:
        ValueError: It exists with another type or shape.
    """
    for value in model.graph.inputs:
        if value.name == name:
            if value.dtype != dtype or value.shape is None or value.shape.dims != shape:
                raise ValueError(f"an input called {name} exists already: {value.dtype} {value.shape}")
            return value
    value = ir.val(name, dtype, ir.Shape(shape))
    model.graph.inputs.append(value)
    return value


def add_cache(model: ir.Model, layer: int, sizes: Sequence[int]) -> tuple[ir.Value, ...]:
    """Add one layer's KV cache to the graph's inputs, each [batch, kv_heads, capacity, head_dim]: keys and values for
    `sizes` = (kv_heads, key_dim, value_dim), keys alone for (kv_heads, key_dim).
    """
    kv_heads, *widths = sizes
    made = []
    for name, width in zip(past_names(layer), widths, strict=False):
        value = ir.val(name, ir.DataType.FLOAT, ir.Shape([BATCH, kv_heads, CAPACITY, width]))
        model.graph.inputs.append(value)
        made.append(value)
    return tuple(made)


def add_present(model: ir.Model, layer: int, values: Sequence[ir.Value], like: Sequence[ir.Value]) -> None:
    """Make `values` the graph's outputs for one layer's KV cache, with the shapes of its inputs."""
    for name, value, past in zip(present_names(layer)[: len(like)], values, like, strict=True):
        value.name, value.shape, value.type = name, past.shape, past.type
        model.graph.outputs.append(value)


def present_of(model: ir.Model, layer: int) -> tuple[ir.Value, ...]:
    """The outputs for one layer's KV cache, none where that layer has no form yet."""
    names = present_names(layer)
    return tuple(value for value in model.graph.outputs if value.name in names)


def cached_layers(model: ir.Model) -> list[int]:
    """The numbers of the layers that have a KV cache, in the order of the graph's inputs."""
    pattern = re.compile(re.escape(past_names(0)[0]).replace("0", "([0-9]+)"))
    return [int(found[1]) for value in model.graph.inputs if (found := pattern.fullmatch(str(value.name)))]


def add_state(model: ir.Model, kind: str, layer: int, sizes: tuple[int, ...]) -> ir.Value:
    """Add one layer's state of a kind to the graph's inputs: [batch, *sizes] float32, zeros before the first token."""
    value = ir.val(past_state_name(layer, kind), ir.DataType.FLOAT, ir.Shape([BATCH, *sizes]))
    model.graph.inputs.append(value)
    return value


def add_present_state(model: ir.Model, kind: str, layer: int, value: ir.Value, past: ir.Value) -> None:
    """Make `value` the graph's output for one layer's state, with the shape of its input."""
    value.name, value.shape, value.type = present_state_name(layer, kind), past.shape, past.type
    model.graph.outputs.append(value)


def set_token_shapes(model: ir.Model) -> None:
    """Name the dimensions of `input_ids` and `attention_mask`."""
    graph_input(model, INPUT_IDS).shape = ir.Shape([BATCH, SEQUENCE])
    graph_input(model, ATTENTION_MASK).shape = ir.Shape([BATCH, TOTAL])


def is_positions(value: ir.Value) -> bool:
    """Whether a value is the new tokens' positions: the input, or what derive_positions replaced it by."""
    if value.is_graph_input():
        return value.name == POSITION_IDS
    node = value.producer()
    return node is not None and node.name == POSITIONS


def block_start(value: ir.Value) -> int | None:
    """The first row of the second block where a value is the rows that choose_rotary_rows chose; None otherwise."""
    node = value.producer()
    if node is None or not str(node.name).startswith(ROTARY_ROWS):
        return None
    product = producer(node.inputs[1], "Mul")
    first = None if product is None else scalar(product.inputs[1])
    return None if first is None else int(first)


def cache_capacity(model: ir.Model) -> int | None:
    """The length of the KV cache where it is a number, None where it is a name."""
    prefix = past_names(0)[0].split(".")[0] + "."
    sizes = {v.shape[2] for v in model.graph.inputs if str(v.name).startswith(prefix) and v.shape}
    (size,) = sizes if len(sizes) == 1 else (None,)
    return size if isinstance(size, int) else None


def table_of(value: ir.Value) -> LazyWeight | None:
    """The lookup table whose rows an input takes, in the input's type, or None."""
    found = value.meta.get(TABLE)
    if not isinstance(found, LazyWeight) or value.dtype is None:
        return None
    if found.dtype == value.dtype:
        return found
    return cast(found, value.dtype, f"{found.name}.{value.dtype.name.lower()}")

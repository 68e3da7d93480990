"""Names and dimensions of the inputs and outputs that every target shares; declared here once.

The names are those that onnxruntime-genai's configuration uses by default, so that other runners find their way too.
"""

from __future__ import annotations

import onnx_ir as ir

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
LOGITS = "logits"
TOP_LOGITS, TOP_IDS = "top_logits", "top_ids"
POSITIONS = "positions"
"""The value that derive_positions puts in the place of the input `position_ids`."""

BATCH, SEQUENCE, TOTAL, CAPACITY = "batch", "sequence", "total", "capacity"


def past_names(layer: int) -> tuple[str, str]:
    """Names of one layer's KV cache inputs: key, value."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Names of one layer's KV cache outputs: key, value."""
    return f"present.{layer}.key", f"present.{layer}.value"


def graph_input(model: ir.Model, name: str) -> ir.Value:
    """The graph input of that name.

    Raises:
        KeyError: There is none.
    """
    for value in model.graph.inputs:
        if value.name == name:
            return value
    raise KeyError(name)


def add_cache(model: ir.Model, layer: int, sizes: tuple[int, int, int]) -> tuple[ir.Value, ir.Value]:
    """Add one layer's KV cache to the graph's inputs: two of [batch, kv_heads, capacity, head_dim], for `sizes` =
    (kv_heads, key_dim, value_dim).
    """
    kv_heads, *widths = sizes
    made = []
    for name, width in zip(past_names(layer), widths, strict=True):
        value = ir.val(name, ir.DataType.FLOAT, ir.Shape([BATCH, kv_heads, CAPACITY, width]))
        model.graph.inputs.append(value)
        made.append(value)
    return made[0], made[1]


def add_present(
    model: ir.Model, layer: int, values: tuple[ir.Value, ir.Value], like: tuple[ir.Value, ir.Value]
) -> None:
    """Make `values` the graph's outputs for one layer's KV cache, of the shapes of its inputs."""
    for name, value, past in zip(present_names(layer), values, like, strict=True):
        value.name, value.shape, value.type = name, past.shape, past.type
        model.graph.outputs.append(value)


def set_token_shapes(model: ir.Model) -> None:
    """Give `input_ids`, `attention_mask` and `position_ids` their dimensions by name."""
    graph_input(model, INPUT_IDS).shape = ir.Shape([BATCH, SEQUENCE])
    graph_input(model, ATTENTION_MASK).shape = ir.Shape([BATCH, TOTAL])


def is_positions(value: ir.Value) -> bool:
    """Whether a value is the new tokens' positions: the input, or what derive_positions made of it."""
    if value.is_graph_input():
        return value.name == POSITION_IDS
    node = value.producer()
    return node is not None and node.name == POSITIONS


def capacity(model: ir.Model) -> int | None:
    """The length of the cache where it is a number."""
    sizes = {v.shape[2] for v in model.graph.inputs if str(v.name).startswith("past_key_values.") and v.shape}
    (size,) = sizes if len(sizes) == 1 else (None,)
    return size if isinstance(size, int) else None

"""Attention over a shared cache -> operators of opset 17 over a cache that is read and written whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.inputs import WINDOW, static_input
from satchel.graphs.ir.values import Builder, attributes, dims, nodes, producer, replace, scalar
from satchel.runtime.bundle.contract import CACHE_INDEX, CACHE_ROWS


@dataclasses.dataclass(frozen=True)
class Layer:
    """A matched attention layer; all sizes are numbers.

    Attributes:
        query: [1, heads, tokens, key_dim].
        scatters: The two writes into the cache, of keys and of values.
        options: scale and softcap of the scores.
        window: How many positions each token sees, 0 for all.
    """

    query: ir.Value
    scatters: tuple[ir.Node, ir.Node]
    options: dict[str, Any]
    window: int
    heads: int
    kv_heads: int
    tokens: int
    capacity: int
    value_dim: int


@graph_pass
def lower_attention_static(model: ir.Model, report: Report) -> None:
    """Lower what expand_attention made to operators that every graph compiler has.

    Which positions the new tokens are written to, and which each of them sees, comes in as inputs. Query heads that
    share a key head are rows of one linear layer, so nothing is repeated.

    before: past, new [1, kv_heads, tokens, width], first position -> TensorScatter -> present
            query, present (keys), present (values), mask -> Attention(scale, softcap) -> [1, heads, tokens, value_dim]
    after:  new -> Gather(cache_index) -> Where(cache_rows, ., past) -> present      (no Gather for one token)
            query * scale -> MatMul(keys, transposed) -> softcap -> Add(mask) -> Softmax -> MatMul(values)
    refuses when: a size is not a number, the cache is not one that TensorScatter writes, or the mask is neither causal
    nor a window over the cache's positions.
    """
    for node in nodes(model, "Attention"):
        with report.refusing(node):
            layer = _match(node)
            _rewrite(model, node, layer)
            report.count += 1


def _match(node: ir.Node) -> Layer:
    options = attributes(node, scale=None, softcap=0.0)
    query, *present, mask = (list(node.inputs) + [None] * 4)[:4]
    scatters = [producer(value, "TensorScatter") for value in present]
    if query is None or not options["scale"] or None in scatters or any(node.inputs[4:]):
        raise Refused("its keys and values do not come from TensorScatter, or its scale is not given")
    keys, values = (scatter for scatter in scatters if scatter is not None)
    for scatter in (keys, values):
        if attributes(scatter, axis=-2, mode="linear") != {"axis": -2, "mode": "linear"}:
            raise Refused("the cache is not written along its positions")
    match dims(query), dims(keys.inputs[0]), dims(values.inputs[0]):
        case (
            [1, int(heads), int(tokens), int()],
            [1, int(kv_heads), int(capacity), int()],
            [1, int(value_heads), int(), int(value_dim)],
        ) if kv_heads == value_heads and heads % kv_heads == 0:
            window = _window(mask)
            reach = window if window < capacity else 0
            sizes = (heads, kv_heads, tokens, capacity, value_dim)
            return Layer(query, (keys, values), options, reach, *sizes)
    raise Refused("the sizes of its heads and of its cache are not numbers")


def _window(mask: ir.Value | None) -> int:
    """The window of a mask that expand_attention made, 0 for causality alone.

    Raises:
        Refused: It is another mask.
    """
    both = producer(mask, "And")
    if both is None and producer(mask, "LessOrEqual") is not None:
        return 0
    near = producer(both.inputs[1], "Greater") if both is not None else None
    reach = producer(near.inputs[1], "Sub") if near is not None else None
    window = scalar(reach.inputs[1]) if reach is not None else None
    if both is None or producer(both.inputs[0], "LessOrEqual") is None or window is None:
        raise Refused("its mask is neither causal nor a window over the cache's positions")
    return int(window)


def _rewrite(model: ir.Model, node: ir.Node, layer: Layer) -> None:
    keys, values = (_written(model, scatter, layer) for scatter in layer.scatters)
    builder, name, like = Builder(model, node), str(node.name), layer.query
    heads, kv_heads, tokens, capacity = layer.heads, layer.kv_heads, layer.tokens, layer.capacity
    rows = heads // kv_heads * tokens
    dtype = (like.dtype or ir.DataType.FLOAT).numpy()

    def number(value: float) -> ir.Value:
        return builder.constant(np.asarray([value], dtype), f"{np.dtype(dtype).name}.{value:.9g}")

    def make(op_type: str, inputs: list[ir.Value], part: str, shape: list[int], **options: Any) -> ir.Value:
        value = builder.value(op_type, inputs, f"{name}.{part}", **options)
        value.shape, value.type = ir.Shape(shape), like.type
        return value

    def reshape(value: ir.Value, part: str, shape: list[int]) -> ir.Value:
        if dims(value) == shape:
            return value
        return make("Reshape", [value, builder.shape(*shape)], part, shape)

    key_dim = int(dims(layer.query)[-1])  # type: ignore[index, arg-type]
    scaled = make("Mul", [layer.query, number(layer.options["scale"])], "scaled", [1, heads, tokens, key_dim])
    grouped = reshape(scaled, "grouped", [1, kv_heads, rows, key_dim])
    turned = make("Transpose", [keys], "keys_turned", [1, kv_heads, key_dim, capacity], perm=[0, 1, 3, 2])
    scores = make("MatMul", [grouped, turned], "products", [1, kv_heads, rows, capacity])
    whole = [1, heads, tokens, capacity]
    scores = reshape(scores, "scores", whole)
    if layer.options["softcap"]:
        cap = number(layer.options["softcap"])
        scores = make("Div", [scores, cap], "over_cap", whole)
        scores = make("Mul", [make("Tanh", [scores], "bent", whole), cap], "capped", whole)
    scores = make("Add", [scores, _mask(model, layer)], "masked", whole)
    shares = make("Softmax", [scores], "shares", whole, axis=-1)
    shares = reshape(shares, "shares_grouped", [1, kv_heads, rows, capacity])
    mixed = make("MatMul", [shares, values], "mixed", [1, kv_heads, rows, layer.value_dim])
    result = reshape(mixed, "by_head", [1, heads, tokens, layer.value_dim])
    replace(node.outputs[0], result)


def _written(model: ir.Model, scatter: ir.Node, layer: Layer) -> ir.Value:
    """The cache with the new tokens' rows in their places; where another layer attends to it, made once."""
    past, new = scatter.inputs[:2]
    builder, name, result = Builder(model, scatter), str(scatter.name), scatter.outputs[0]
    capacity = layer.capacity
    rows = static_input(model, CACHE_ROWS, ir.DataType.BOOL, (1, 1, capacity, 1))
    if layer.tokens > 1:
        index = static_input(model, CACHE_INDEX, ir.DataType.INT64, (capacity,))
        new = builder.value("Gather", [new, index], f"{name}.placed", past, axis=2)
    written = builder.value("Where", [rows, new, past], f"{name}.written", past)
    written.type = result.type if result.type is not None else written.type
    replace(result, written)
    return written


def _mask(model: ir.Model, layer: Layer) -> ir.Value:
    """The input that is 0 where a token sees a position and large and negative elsewhere; one for each window."""
    name = f"mask_{layer.window}" if layer.window else "mask"
    dtype = layer.query.dtype or ir.DataType.FLOAT
    value = static_input(model, name, dtype, (1, 1, layer.tokens, layer.capacity))
    value.meta[WINDOW] = layer.window
    return value

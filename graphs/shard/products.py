"""Finds linear layers in the graphs of a bundle, in each form in which these have them, and cuts them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.linear import BIAS, NORM_WEIGHT, RESIDUAL, SCALES, ZERO_POINTS, has_input
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, producer
from satchel.graphs.ir.weights import LazyWeight, pack_rows, unpack_rows
from satchel.graphs.shard.adapters import added_by, gained_by
from satchel.graphs.shard.slices import (
    KEY,
    NotCutError,
    Ranges,
    Slicer,
    common_block,
    cut_matrix,
    is_derived,
    matrix_size,
    shifted,
    taken,
    width,
)
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.layouts import HALF_BITS, Form, parts

GATED = ".gated_panels"


@dataclasses.dataclass(frozen=True)
class Product:
    """A linear layer, with what rounds its input and scales its result.

    Attributes:
        y: Its result, [..., outputs].
        x: Its input in float, [..., inputs].
        inputs, outputs: Their widths; `outputs` of a gated layer is that of the result.
        unit: How many neighboring inputs should stay together.
        must: How many must.
        nodes: Those between `x` and `y`.
        columns: Keep some outputs. Raises NotCutError.
        quantized: Whether its weights are. Some kernels then round `x` as well.
        rows: Keep some inputs; returns what is to be added to the sum over all ranks. None where that is not possible.
    """

    y: ir.Value
    x: ir.Value
    inputs: int
    outputs: int
    unit: int
    must: int
    nodes: tuple[ir.Node, ...]
    columns: Callable[[Slicer, Ranges], None]
    rows: Callable[[Slicer, Ranges], list[ir.Value]] | None
    quantized: bool = False


def product_of(y: ir.Value) -> Product | None:
    """The linear layer whose result is `y`, or None. What adapters add to its result is part of it."""
    found = _adapted(producer(y, "Add")) or _base(y)
    users = [use.node for use in y.uses()]
    if len(users) != 1 or found is None:
        return found
    gains = gained_by(users[0])
    behind = users[0] if gains is None else next((use.node for use in users[0].outputs[0].uses()), None)
    return None if behind is not None and _adapted(behind) is not None else found


def _adapted(node: ir.Node | None) -> Product | None:
    """A linear layer with what adapters add to its result, which may have gains."""
    if node is None or (node.domain, node.op_type) != ("", "Add"):
        return None
    own = node.inputs[0]
    gains = gained_by(own.producer() if own is not None else None)
    own = own if gains is None else gains.multiplied.inputs[0]
    base = _base(own) if own is not None else None
    added = added_by(node.inputs[1], base.x) if base is not None else None
    if base is None or added is None:
        return None
    base_rows = base.rows

    def columns(slicer: Slicer, ranges: Ranges) -> None:
        base.columns(slicer, ranges)
        added.columns(slicer, ranges)
        if gains is not None:
            gains.columns(slicer, ranges)

    def rows(slicer: Slicer, ranges: Ranges) -> list[ir.Value]:
        after = base_rows(slicer, ranges) if base_rows is not None else []
        return [*after, *added.rows(slicer, ranges)]

    inner = (*base.nodes, *added.nodes, *(() if gains is None else gains.nodes), node)
    by_input = base_rows is not None and base.must == 1 and added.by_input
    return dataclasses.replace(base, y=node.outputs[0], nodes=inner, columns=columns, rows=rows if by_input else None)


def _base(y: ir.Value) -> Product | None:
    node = y.producer()
    if node is None:
        return None
    if (node.domain, node.op_type) == (INTERNAL, "Linear"):
        return _native(node)
    if (node.domain, node.op_type) == (INTERNAL, "TableLinear"):
        return _by_output(node, "inputs", "outputs")
    if (node.domain, node.op_type) == (MICROSOFT, "MatMulNBits"):
        return _in_blocks(node)
    if (node.domain, node.op_type) == (MICROSOFT, "FusedMatMul"):
        return _transposed(node)
    if node.domain == "" and node.op_type == "Mul":
        return _rounded_by_row(node) or _integer(node)
    if node.domain == "" and node.op_type == "MatMul":
        rescale = next((use.node for use in y.uses()), None)
        if rescale is not None and _rounded_by_row(rescale) is not None:
            return None
        return _plain(y, node.inputs[0], node, (node,))
    return None


def _plain(y: ir.Value, x: ir.Value | None, matmul: ir.Node, nodes: tuple[ir.Node, ...], at: int = 1) -> Product | None:
    size = matrix_size(matmul.inputs[at])
    if size is None or x is None or x.const_value is not None:
        return None
    inputs, outputs, block = size

    def columns(slicer: Slicer, ranges: Ranges) -> None:
        cut_matrix(slicer, matmul, at, 1, ranges)

    def rows(slicer: Slicer, ranges: Ranges) -> list[ir.Value]:
        cut_matrix(slicer, matmul, at, 0, ranges)
        return []

    matrix = matmul.inputs[at]
    widened = producer(matrix, "Cast")
    quantized = producer(matrix if widened is None else widened.inputs[0], "DequantizeLinear") is not None
    return Product(y, x, inputs, outputs, block, 1, nodes, columns, rows, quantized)


def _rounded_by_row(node: ir.Node) -> Product | None:
    """MatMul over x that is divided by its largest magnitude, rounded, and multiplied by that magnitude."""
    matmul = producer(node.inputs[0], "MatMul") if node.op_type == "Mul" and node.domain == "" else None
    widened = producer(matmul.inputs[0], "DequantizeLinear") if matmul is not None else None
    rounded = producer(widened.inputs[0], "QuantizeLinear") if widened is not None else None
    divided = producer(rounded.inputs[0], "Div") if rounded is not None else None
    if (
        matmul is None
        or widened is None
        or rounded is None
        or divided is None
        or divided.inputs[1] is not node.inputs[1]
    ):
        return None
    largest = producer(divided.inputs[1], "Max")
    if largest is None:
        return None
    made = [n for v in largest.inputs if v is not None and (n := v.producer()) is not None]
    made += [
        n for each in made for v in each.inputs if v is not None and (n := v.producer()) and n.op_type == "ReduceMin"
    ]
    return _plain(node.outputs[0], divided.inputs[0], matmul, (node, matmul, widened, rounded, divided, largest, *made))


def _integer(node: ir.Node) -> Product | None:
    """MatMulInteger over x that is rounded with one scale for all of it."""
    cast, scale = producer(node.inputs[0], "Cast"), producer(node.inputs[1], "Mul")
    matmul = producer(cast.inputs[0], "MatMulInteger") if cast is not None else None
    rounded = producer(matmul.inputs[0], "DynamicQuantizeLinear") if matmul is not None else None
    if cast is None or scale is None or matmul is None or rounded is None or scale.inputs[0] is not rounded.outputs[1]:
        return None
    found = _plain(node.outputs[0], rounded.inputs[0], matmul, (node, cast, scale, matmul, rounded))
    if found is None:
        return None

    def columns(slicer: Slicer, ranges: Ranges) -> None:
        cut_matrix(slicer, matmul, 1, 1, ranges)
        slicer.use(scale, 1, -1, ranges)
        if len(matmul.inputs) > 3:
            slicer.use(matmul, 3, -1, ranges)

    return dataclasses.replace(found, columns=columns, quantized=True)


def _native(node: ir.Node) -> Product | None:
    x, panels = node.inputs[:2]
    if x is None or panels is None or not is_derived(panels):
        return None
    ints = {key: node.attributes.get_int(key, 0) for key in ("inputs", "outputs", "block", "hadamard")}
    gated, inputs, block = node.attributes.get("gate") is not None, ints["inputs"], ints["block"]
    half = ints["outputs"] // 2 if gated else ints["outputs"]
    added = added_by(node.inputs[RESIDUAL], x) if has_input(node, RESIDUAL) else None

    def repack(slicer: Slicer, inputs: int, outputs: int, block: int) -> None:
        base = str(panels.name).removesuffix(GATED if str(panels.name).endswith(GATED) else ".panels")
        groups, bits = inputs // block if block else 1, node.attributes.get_int("bits", 8)
        half_scales = has_input(node, SCALES) and node.inputs[SCALES].dtype == ir.DataType.FLOAT16  # type: ignore[union-attr]
        symmetric = bits == HALF_BITS or not has_input(node, ZERO_POINTS)
        form = Form(inputs, outputs, groups, bits, symmetric, half_scales)
        made = parts(Layout.PANELS, form, gated=str(panels.name).endswith(GATED))
        for index, (ending, part) in enumerate(made.items(), start=1):
            tensor = LazyWeight(base + ending, part.shape, ir.DataType(part.dtype.onnx), _unread)
            tensor.meta[KEY] = (base + ending, part.shape)
            tensor.meta[DERIVED_FILE] = str(panels.const_value.location)  # type: ignore[union-attr]
            node.replace_input_with(index, slicer.add(tensor, base + ending))
        for key, size in (("inputs", inputs), ("outputs", outputs), ("block", block)):
            node.attributes.add(ir.AttrInt64(key, size))

    def columns(slicer: Slicer, ranges: Ranges) -> None:
        kept = (*ranges, *shifted(ranges, half)) if gated else ranges
        if added is not None:
            added.columns(slicer, kept)
        elif has_input(node, RESIDUAL):
            raise NotCutError(f"{node.name} has a residual")
        if has_input(node, BIAS):
            slicer.use(node, BIAS, -1, kept)
        repack(slicer, inputs, width(kept), block)

    def rows(slicer: Slicer, ranges: Ranges) -> list[ir.Value]:
        repack(slicer, width(ranges), ints["outputs"], common_block(block, ranges) if block else 0)
        whole = (BIAS, RESIDUAL) if added is None else (BIAS,)
        after = [value for i in whole if has_input(node, i) and (value := node.inputs[i]) is not None]
        for index in whole:
            if has_input(node, index):
                node.replace_input_with(index, None)
        return after if added is None else [*after, *added.rows(slicer, ranges)]

    plain = not gated and not has_input(node, NORM_WEIGHT) and not node.attributes.get_float("epsilon", 0.0)
    must = max(ints["hadamard"], 1)
    if added is not None:
        plain = plain and must == 1 and added.by_input
    unit, quantized = math.lcm(must, block or 1), node.attributes.get_int("bits", 8) != HALF_BITS
    inner = (node,) if added is None else (node, *added.nodes)
    return Product(node.outputs[0], x, inputs, half, unit, must, inner, columns, rows if plain else None, quantized)


def take_residual(product: Product) -> ir.Value | None:
    """What a layer adds to its result last, and adds no more; None if it adds nothing but what adapters add."""
    for node in product.nodes:
        given = (node.domain, node.op_type) == (INTERNAL, "Linear") and has_input(node, RESIDUAL)
        if given and added_by(node.inputs[RESIDUAL], product.x) is None:
            residual = node.inputs[RESIDUAL]
            node.replace_input_with(RESIDUAL, None)
            return residual
    return None


DERIVED_FILE = "file"
"""Mark of a tensor that a device makes: the file that its graph names."""


def _unread(start: int, stop: int) -> NoReturn:
    raise ValueError("a device makes this tensor")


def _by_output(node: ir.Node, inputs: str, name: str) -> Product | None:
    """A layer whose matrix is stored by output: [outputs, ...]. `inputs` and `name` are the attributes of its sizes."""
    x, codes = node.inputs[:2]
    outputs = node.attributes.get_int(name, 0)
    if x is None or codes is None or codes.const_value is None or codes.const_value.shape[0] != outputs:
        return None

    def columns(slicer: Slicer, ranges: Ranges) -> None:
        for index in range(1, len(node.inputs)):
            slicer.use(node, index, 0, ranges)
        node.attributes.add(ir.AttrInt64(name, width(ranges)))

    return Product(node.outputs[0], x, node.attributes.get_int(inputs, 0), outputs, 1, 1, (node,), columns, None, True)


def _in_blocks(node: ir.Node) -> Product | None:
    """MatMulNBits: quantized values [outputs, blocks, bytes], scales and packed zero points [outputs, blocks]."""
    found = _by_output(node, "K", "N")
    operands = [*node.inputs[1:], None, None, None, None, None][:5]
    codes, scales, points, order, bias = operands
    block, bits = node.attributes.get_int("block_size", 0), node.attributes.get_int("bits", 4)
    shape = codes.const_value.shape.numpy() if codes is not None and codes.const_value is not None else ()
    if found is None or order is not None or scales is None or len(shape) != 3 or shape[1] * block != found.inputs:
        return found
    outputs, blocks, _ = shape

    def rows(slicer: Slicer, ranges: Ranges) -> list[ir.Value]:
        finer = common_block(block, ranges)
        groups = tuple(range(part.start // finer, part.stop // finer) for part in ranges)
        factor, count = block // finer, width(groups)

        def of_groups(values: np.ndarray) -> np.ndarray:
            return taken(np.repeat(values, factor, axis=1), 1, groups)

        def packed(values: np.ndarray) -> np.ndarray:
            return pack_rows(of_groups(unpack_rows(values.reshape(outputs, -1), bits, blocks)), bits)

        key = ("in_blocks", ranges)
        slicer.remake(
            node, 1, (outputs, count, finer * bits // 8),
            lambda values: taken(values.reshape(outputs, blocks * factor, -1), 1, groups), key,
        )  # fmt: skip
        slicer.remake(node, 2, (outputs, count), lambda values: of_groups(values.reshape(outputs, blocks)), key)
        if points is not None and points.dtype == ir.DataType.UINT8:
            slicer.remake(node, 3, (outputs, -(-count * bits // 8)), packed, key)
        elif points is not None:
            slicer.remake(node, 3, (outputs, count), lambda values: of_groups(values.reshape(outputs, blocks)), key)
        for name, size in (("K", width(ranges)), ("block_size", finer)):
            node.attributes.add(ir.AttrInt64(name, size))
        if bias is not None:
            node.replace_input_with(BLOCK_BIAS, None)
        return [] if bias is None else [bias]

    return dataclasses.replace(found, unit=block, rows=rows)


BLOCK_BIAS = 5
"""Where MatMulNBits takes its bias."""


def _transposed(node: ir.Node) -> Product | None:
    """A product with a constant matrix that is stored by output, [outputs, inputs], such as a head that is also the
    table of tokens."""
    x, matrix = node.inputs
    tensor = matrix.const_value if matrix is not None else None
    plain = all(node.attributes.get_int(name, 0) == 0 for name in ("transA", "transBatchA", "transBatchB"))
    if x is None or tensor is None or len(tensor.shape) != 2 or not plain or not node.attributes.get_int("transB", 0):
        return None
    outputs, inputs = tensor.shape.numpy()
    return Product(
        node.outputs[0], x, inputs, outputs, 1, 1, (node,), lambda slicer, kept: slicer.use(node, 1, 0, kept), None
    )


def add_after(graph: ir.Model, value: ir.Value, others: list[ir.Value], at: ir.Node) -> ir.Value:
    """The sum of a value and others, whose last axis is as wide, in nodes before `at`."""
    builder = Builder(graph, at)
    for index, other in enumerate(others):
        value = builder.value("Add", [value, other], f"{value.name}.plus{index}", value)
    return value

"""A quantized weight: its values and grid, and the layouts in which kernels read them; one in float16 likewise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.graphs.ir.values import Builder, nodes
from satchel.graphs.ir.weights import LazyWeight, from_array, pack_rows
from satchel.graphs.quant.recipe import Rule
from satchel.graphs.quant.rounding import Grid
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.dtypes import QUANTIZED
from satchel.runtime.bundle.layouts import HALF_BITS, ROWS, Form, Weight, pack, parts

LAYOUT = "layout"
"""Mark (`meta`) of weights that no bundle holds, and a device makes from those that it does: their `Layout`."""

SOURCE = "source"
"""Mark of the same weights: the `Derivable` that they are made from."""

PANEL_GROUPS = 8
"""Group sizes that satchel's own kernels take are multiples of this."""

INT8_PRODUCTS = 4
"""The `accuracy_level` at which MatMulNBits rounds its activations to 8 bits, group by group."""

FLOAT_PRODUCTS = 1
"""That at which it computes in float32."""


class Derivable:
    """A weight whose layouts for kernels a device makes from what its bundle stores."""

    name: str

    @property
    def _form(self) -> Form:
        raise NotImplementedError

    def _weight(self) -> Weight:
        """The weight as `pack` takes it."""
        raise NotImplementedError

    def derived(self, layout: Layout, *, gated: bool = False) -> tuple[LazyWeight, ...]:
        """The tensors of another layout, marked with it and with this weight: values, scales, and zero points where
        there are any.

        No bundle has them: a device makes them from what is stored, by the same function that computes their values
        here. `gated` is as in `satchel.runtime.bundle.layouts.parts`, which names and describes them.

        Raises:
            ValueError: The layout cannot hold the weight.
        """

        def rows(ending: str) -> Callable[[int, int], np.ndarray]:
            return lambda a, b: pack(layout, self._weight(), gated=gated)[ending][a:b]

        made = []
        for ending, part in parts(layout, self._form, gated=gated).items():
            dtype = ir.DataType(part.dtype.onnx)
            made.append(LazyWeight(f"{self.name}{ending}", part.shape, dtype, rows(ending), computed=True))
            made[-1].meta |= {LAYOUT: layout, SOURCE: self}
        return tuple(made)


@dataclasses.dataclass(frozen=True)
class HalfWeight(Derivable):
    """A weight [inputs, outputs] of a linear layer that is stored in float16.

    Attributes:
        name: Its name in the graph.
        half: Its values in float16.
    """

    name: str
    half: LazyWeight

    @property
    def _form(self) -> Form:
        inputs, outputs = self.half.dims
        return Form(inputs, outputs, groups=1, bits=HALF_BITS, symmetric=True)

    def _weight(self) -> Weight:
        values = self.half.numpy()
        return Weight(values, np.ones((1, values.shape[1]), np.float32), None, HALF_BITS)


@dataclasses.dataclass(frozen=True)
class QuantizedWeight(Derivable):
    """The quantized values of one weight [outputs, inputs] on their grid.

    Attributes:
        name: The weight's name in the graph.
        grid: Scheme, scales [outputs, groups] and zero points. For experts, outputs are those of one after the other.
        codes: [outputs, inputs], one code per element: int8, or uint8 where there are zero points; may be mapped from
            a file.
    """

    name: str
    grid: Grid
    codes: NDArray[np.int8] | NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Bytes of quantized values, scales and zero points as they are stored for a linear layer."""
        zero_points = 0 if self.grid.zero_points is None else self.grid.zero_points.size * self.grid.scheme.bits // 8
        return self.codes.size * self.grid.scheme.bits // 8 + self.grid.half_scales.nbytes + zero_points

    def columns(self) -> tuple[LazyWeight, LazyWeight, LazyWeight | None]:
        """Quantized values [inputs, outputs], scales and zero points [groups, outputs] for DequantizeLinear, axis 0.

        Where each output has one scale, scales and zero points are [outputs], for axis 1. Scales are those of
        `Grid.half_scales`.
        """
        scheme, grid = self.grid.scheme, self.grid
        dtype = code_type(grid)
        outputs, inputs = self.codes.shape
        codes = LazyWeight(
            f"{self.name}.codes", (inputs, outputs), dtype,
            lambda a, b: np.ascontiguousarray(self.codes[:, a:b].T).astype(dtype.numpy()),
        )  # fmt: skip
        per_channel = scheme.block is None

        def laid_out(array: np.ndarray) -> np.ndarray:
            return array[:, 0] if per_channel else np.ascontiguousarray(array.T)

        scales = from_array(f"{self.name}.scales", laid_out(grid.half_scales), computed=True)
        if grid.zero_points is None:
            return codes, scales, None
        points = laid_out(grid.zero_points).astype(dtype.numpy())
        return codes, scales, from_array(f"{self.name}.zero_points", points, computed=True)

    def fits_panels(self) -> bool:
        """Whether satchel's own kernels support a weight that is quantized like this.

        They take a scale for each output with symmetric quantized values of 8 bits, or groups of a multiple of eight
        inputs.
        """
        scheme, inputs = self.grid.scheme, self.codes.shape[1]
        if scheme.block is None:
            return scheme.bits == 8 and self.grid.zero_points is None
        return scheme.block % PANEL_GROUPS == 0 and inputs % scheme.block == 0

    @property
    def _form(self) -> Form:
        return self._weight().form

    def _weight(self) -> Weight:
        grid, points = self.grid, self.grid.zero_points
        return Weight(self.codes.T, grid.half_scales.T, None if points is None else points.T, grid.scheme.bits)

    def rows(self) -> tuple[LazyWeight, LazyWeight, LazyWeight | None]:
        """Values [outputs, inputs * bits / 8], scales [outputs, groups], zero points [outputs, groups * bits / 8].

        Values and zero points are uint8; four bits are packed two to a byte, the first in the low half. Values of
        symmetric schemes have half the range added, the zero point that MatMulNBits, GatherBlockQuantized and QMoE
        assume. A device reads them by name, and the name says how many bits they have.
        """
        grid, bits = self.grid, self.grid.scheme.bits
        offset = (1 << (bits - 1)) if grid.zero_points is None else 0
        outputs, inputs = self.codes.shape

        def packed(a: int, b: int) -> np.ndarray:
            return pack_rows((self.codes[a:b].astype(np.int16) + offset).astype(np.uint8), bits)

        codes = LazyWeight(f"{self.name}{ROWS[bits]}", (outputs, inputs * bits // 8), ir.DataType.UINT8, packed)
        scales = from_array(f"{self.name}.row_scales", grid.scales, computed=True)
        if grid.zero_points is None:
            return codes, scales, None
        points = pack_rows(grid.zero_points, bits)
        return codes, scales, from_array(f"{self.name}.row_zero_points", points, computed=True)


@dataclasses.dataclass(frozen=True)
class TableWeight(Derivable):
    """A table of quantized values that is stored as lookups read it (`QuantizedWeight.rows`), as a linear layer's
    weight: its scales are in float32.

    Attributes:
        name: Its name in the graph.
        table: The table [outputs, inputs].
    """

    name: str
    table: QuantizedWeight

    @property
    def _form(self) -> Form:
        return self._weight().form

    def _weight(self) -> Weight:
        return dataclasses.replace(self.table._weight(), scales=self.table.grid.scales.T)


def float_scales(builder: Builder, scales: LazyWeight, name: str) -> ir.Value:
    """An initializer for scales, and for scales in float16 a Cast to float32 called `name`: a session folds it once,
    when it loads the graph."""
    stored = builder.shared(scales)
    if scales.dtype != ir.DataType.FLOAT16:
        return stored
    wide = builder.value("Cast", [stored], name, to=ir.DataType.FLOAT)
    wide.shape, wide.type = stored.shape, ir.TensorType(ir.DataType.FLOAT)
    return wide


def code_type(grid: Grid) -> ir.DataType:
    """The type of a grid's quantized values as DequantizeLinear reads them."""
    return ir.DataType(QUANTIZED[grid.scheme.bits, grid.zero_points is None].onnx)


@dataclasses.dataclass(frozen=True)
class KVScales:
    """One scale for each channel of one layer's int8 cache.

    Attributes:
        key: [kv_heads, head_dim] float32: value = quantized value * scale.
        value: The same for the values.
    """

    key: NDArray[np.float32]
    value: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A model whose weights are rounded.

    Attributes:
        model: The float graph that all phases share, its weights transformed.
        weights: What is stored for each weight that a rule matched, by the name of the float weight.
        rules: The rule of each, by the same names.
        kv_scales: Scales of the KV cache by layer; empty for a float cache.
        recipe: The name of the recipe that they come from.
    """

    model: ir.Model
    weights: Mapping[str, QuantizedWeight]
    rules: Mapping[str, Rule]
    kv_scales: Mapping[int, KVScales]
    recipe: str


def quantized_products(
    model: ir.Model, weights: Mapping[str, QuantizedWeight]
) -> Iterator[tuple[ir.Node, QuantizedWeight]]:
    """The linear layers of a graph by one of these weights, each with what is stored for it."""
    for node in nodes(model, "MatMul"):
        matrix = node.inputs[1]
        quantized = weights.get(str(matrix.name)) if matrix is not None and matrix.is_initializer() else None
        if quantized is not None:
            yield node, quantized

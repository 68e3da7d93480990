"""A quantized weight: its codes and grid, and the layouts in which kernels read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.graphs.ir.values import nodes
from satchel.graphs.ir.weights import LazyWeight, from_array, pack_rows
from satchel.graphs.quant.panels import MIDDLE, PANEL, TOGETHER, pack_panels, panel_outputs
from satchel.graphs.quant.recipe import Rule
from satchel.graphs.quant.rounding import Grid
from satchel.runtime.bundle.dtypes import QUANTIZED

MADE = "made"
"""Mark of weights that no bundle holds and a device makes of those that it does: EXPANDED, BLOCKS or PANELS."""

EXPANDED, BLOCKS, PANELS = "expanded", "blocks", "panels"
"""Int8 with a scale per output, made of smaller blocks; the other way round; and in the order of satchel's kernels."""

BLOCK = 64
"""Inputs of a block; the last one is filled up. With 128 a row's product depends on how many rows there are."""

PANEL_BLOCKS = 8
"""Inputs of whose multiples the blocks are that satchel's own kernels take."""

INT8_PRODUCTS = 4
"""The `accuracy_level` at which MatMulNBits rounds its activations to 8 bits, block by block."""

INT8_LEVELS = 127
UINT8_ZERO = 128
SMALLEST_RANGE = np.float32(1e-10)
"""An output's largest weight counts as this much at least, so that zeros stay zeros."""


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """The codes of one weight [outputs, inputs] on their grid.

    Attributes:
        name: The weight's name in the graph.
        grid: Scheme, scales [outputs, blocks] and zero points. For experts, outputs are those of one after the other.
        codes: [outputs, inputs], one code per element: int8, or uint8 where there are zero points; may be mapped from
            a file.
    """

    name: str
    grid: Grid
    codes: NDArray[np.int8] | NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points as they are stored."""
        zero_points = 0 if self.grid.zero_points is None else self.grid.zero_points.size * self.grid.scheme.bits // 8
        return self.codes.size * self.grid.scheme.bits // 8 + self.grid.scales.nbytes + zero_points

    def columns(self) -> tuple[LazyWeight, LazyWeight, LazyWeight | None]:
        """Codes [inputs, outputs], scales and zero points [blocks, outputs] for DequantizeLinear along axis 0.

        Where each output has one scale, scales and zero points are [outputs], for axis 1.
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

        scales = from_array(f"{self.name}.scales", laid_out(grid.scales), computed=True)
        if grid.zero_points is None:
            return codes, scales, None
        points = laid_out(grid.zero_points).astype(dtype.numpy())
        return codes, scales, from_array(f"{self.name}.zero_points", points, computed=True)

    def expanded(self) -> tuple[LazyWeight, LazyWeight]:
        """The values in int8 with a scale per output: codes [inputs, outputs] and scales [outputs] for axis 1.

        They are marked EXPANDED: no bundle has them, a device makes them of what `columns` stores
        (satchel.runtime.optimize.expand). Codes often lie between two steps, so both round in float32.
        """
        outputs, inputs = self.codes.shape

        def scales(a: int, b: int) -> NDArray[np.float32]:
            largest = np.abs(self._values(a, b)).max(axis=1)
            steps: NDArray[np.float32] = np.maximum(largest, SMALLEST_RANGE) / np.float32(INT8_LEVELS)
            return steps

        def codes(a: int, b: int) -> NDArray[np.int8]:
            steps = np.rint(self._values(0, outputs) / scales(0, outputs)[:, None])
            return np.ascontiguousarray(steps[:, a:b].T).astype(np.int8)

        made = (
            LazyWeight(f"{self.name}.int8", (inputs, outputs), ir.DataType.INT8, codes, computed=True),
            LazyWeight(f"{self.name}.int8_scales", (outputs,), ir.DataType.FLOAT, scales, computed=True),
        )
        for lazy in made:
            lazy.meta[MADE] = EXPANDED
        return made

    def blocked(self) -> tuple[LazyWeight, LazyWeight]:
        """Codes with a scale per output as MatMulNBits takes them: the same numbers, cut into blocks of inputs.

        Codes [outputs, blocks, block] uint8 have 128 added. The last block is filled up with zeros, which the operator
        does not read. Scales [outputs, blocks] are the output's, again and again. Both are marked BLOCKS: a device
        makes them (satchel.runtime.optimize.blocks).
        """
        outputs, inputs = self.codes.shape
        count = -(-inputs // BLOCK)

        def codes(a: int, b: int) -> NDArray[np.uint8]:
            whole = np.full((b - a, count * BLOCK), UINT8_ZERO, np.uint8)
            whole[:, :inputs] = self.codes[a:b].astype(np.int16) + UINT8_ZERO
            return whole.reshape(b - a, count, BLOCK)

        def scales(a: int, b: int) -> NDArray[np.float32]:
            return np.repeat(self.grid.scales[a:b], count, axis=1)

        made = (
            LazyWeight(f"{self.name}.block_codes", (outputs, count, BLOCK), ir.DataType.UINT8, codes, computed=True),
            LazyWeight(f"{self.name}.block_scales", (outputs, count), ir.DataType.FLOAT, scales, computed=True),
        )
        for lazy in made:
            lazy.meta[MADE] = BLOCKS
        return made

    def fits_panels(self) -> bool:
        """Whether satchel's own kernels multiply by such codes.

        They take a scale for each output with symmetric codes of 8 bits, or blocks of a multiple of eight inputs.
        """
        scheme, inputs = self.grid.scheme, self.codes.shape[1]
        if scheme.block is None:
            return scheme.bits == 8 and self.grid.zero_points is None
        return scheme.block % PANEL_BLOCKS == 0 and inputs % scheme.block == 0

    def panels(self, *, gated: bool = False) -> tuple[LazyWeight, LazyWeight, LazyWeight | None]:
        """Codes, scales and zero points as satchel's own kernels read them (satchel.graphs.quant.panels).

        Codes [panels, bytes] uint8, those of symmetric schemes with half the range added. Scales [panels, blocks, 16]
        float32, 0 for outputs that fill up a panel. Zero points [panels, blocks, 16] uint8. All are marked PANELS: a
        device makes them (satchel.runtime.optimize.native).

        Args:
            gated: The first half of the outputs and the second take turns, panel by panel.
        """
        grid, bits, (outputs, inputs) = self.grid, self.grid.scheme.bits, self.codes.shape
        places = panel_outputs(outputs, gated=gated)
        added = MIDDLE[bits] if grid.zero_points is None else 0
        bytes_of_panel = PANEL * bits * (-(-inputs // TOGETHER[bits]) * TOGETHER[bits]) // 8

        def codes(a: int, b: int) -> NDArray[np.uint8]:
            wanted = places[a:b].reshape(-1)
            taken = (self.codes[np.maximum(wanted, 0)].astype(np.int16) + added).astype(np.uint8)
            return pack_panels(np.where(wanted[:, None] < 0, np.uint8(MIDDLE[bits]), taken), bits)

        def columns(array: np.ndarray, fill: int) -> np.ndarray:
            taken = np.where(places[..., None] < 0, array.dtype.type(fill), array[np.maximum(places, 0)])
            return np.ascontiguousarray(taken.transpose(0, 2, 1))

        name, shape = f"{self.name}.{'gated_' if gated else ''}panel", (len(places), grid.scales.shape[1], PANEL)
        made = [
            LazyWeight(f"{name}s", (len(places), bytes_of_panel), ir.DataType.UINT8, codes, computed=True),
            LazyWeight(
                f"{name}_scales", shape, ir.DataType.FLOAT, lambda a, b: columns(grid.scales, 0)[a:b], computed=True
            ),
        ]
        points = grid.zero_points
        if points is not None:
            zeros = LazyWeight(
                f"{name}_zero_points", shape, ir.DataType.UINT8,
                lambda a, b: columns(points, MIDDLE[bits])[a:b], computed=True,
            )  # fmt: skip
            made.append(zeros)
        for lazy in made:
            lazy.meta[MADE] = PANELS
        return made[0], made[1], made[2] if points is not None else None

    def _values(self, a: int, b: int) -> NDArray[np.float32]:
        """What the codes of outputs `a` to `b` stand for, [outputs, inputs] float32."""
        grid = self.grid
        zero_points = None if grid.zero_points is None else grid.zero_points[a:b]
        part = dataclasses.replace(grid, scales=grid.scales[a:b], zero_points=zero_points)
        return part.values(self.codes[a:b].astype(np.int16)).astype(np.float32)

    def rows(self) -> tuple[LazyWeight, LazyWeight, LazyWeight | None]:
        """Codes [outputs, inputs * bits / 8] uint8, scales [outputs, blocks], zero points [outputs, blocks * bits / 8].

        Codes of symmetric schemes have half the range added, the zero point that MatMulNBits, GatherBlockQuantized and
        QMoE assume. Four bits are packed two to a byte, the first in the low half.
        """
        grid, bits = self.grid, self.grid.scheme.bits
        offset = (1 << (bits - 1)) if grid.zero_points is None else 0
        outputs, inputs = self.codes.shape

        def packed(a: int, b: int) -> np.ndarray:
            return pack_rows((self.codes[a:b].astype(np.int16) + offset).astype(np.uint8), bits)

        codes = LazyWeight(f"{self.name}.rows", (outputs, inputs * bits // 8), ir.DataType.UINT8, packed)
        scales = from_array(f"{self.name}.row_scales", grid.scales, computed=True)
        if grid.zero_points is None:
            return codes, scales, None
        points = pack_rows(grid.zero_points, bits)
        return codes, scales, from_array(f"{self.name}.row_zero_points", points, computed=True)


def code_type(grid: Grid) -> ir.DataType:
    """The type of a grid's quantized values as DequantizeLinear reads them."""
    return ir.DataType(QUANTIZED[grid.scheme.bits, grid.zero_points is None].onnx)


@dataclasses.dataclass(frozen=True)
class KVScales:
    """One scale for each channel of one layer's int8 cache.

    Attributes:
        key: [kv_heads, head_dim] float32: value = code * scale.
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
    """The products of a graph by one of these weights, each with what is stored for it."""
    for node in nodes(model, "MatMul"):
        matrix = node.inputs[1]
        quantized = weights.get(str(matrix.name)) if matrix is not None and matrix.is_initializer() else None
        if quantized is not None:
            yield node, quantized

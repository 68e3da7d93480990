"""The grid on which a checkpoint stores a weight already, so that it is kept and not rounded a second time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.quant.recipe import BLOCKS, CHANNEL, Recipe, Rule, Scheme
from satchel.graphs.quant.rounding import Grid

GRID = "grid"
"""The mark (`meta`) of a checkpoint's weight that is on a grid: its `StoredGrid`."""

WIDENED = "widened"
"""The mark of a checkpoint's weight that is stored quantized, but on no grid that a kernel reads: the reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class StoredGrid:
    """Where the values of a weight [.., outputs, inputs] lie: value = (quantized value - zero point) * scale.

    The quantized values are not here: dividing the float32 values by their scales gives them back exactly.

    Attributes:
        scheme: Bits, group size and symmetry, as kernels read them.
        scales: [.., outputs, groups] float32.
        zero_points: [.., outputs, groups] uint8; None where the scheme is symmetric.
        order: The order of the inputs in which a group's inputs are neighbors, [inputs] int64; None if they are.
        token_activations: Whether the checkpoint wants its inputs rounded to int8, token by token.
    """

    scheme: Scheme
    scales: LazyWeight
    zero_points: LazyWeight | None = None
    order: NDArray[np.int64] | None = None
    token_activations: bool = False

    def mapped(self, function: Callable[[LazyWeight], LazyWeight]) -> StoredGrid:
        """The grid after `function`, which moves outputs, and so changes scales and zero points as it does a weight."""
        points = None if self.zero_points is None else function(self.zero_points)
        return dataclasses.replace(self, scales=function(self.scales), zero_points=points)

    def rule(self, layers: tuple[str, ...]) -> Rule:
        """The rule that keeps layers on such a grid."""
        block = CHANNEL if self.scheme.block is None else self.scheme.block
        prefill, decode = ("token", "tensor") if self.token_activations else ("float", "float")
        return Rule(layers, bits=self.scheme.bits, blocks=(block,), symmetric=self.scheme.symmetric,
                    rounding=STORED, prefill=prefill, decode=decode)  # fmt: skip


STORED = "stored"
"""The `rounding` of such a rule, which no recipe file can name."""


def kernel_block(group: int) -> int | None:
    """The largest group size of the kernels that divides a stored one, whose groups may be cut without any change.

    None if there is none.
    """
    return next((block for block in reversed(BLOCKS) if group % block == 0), None)


def keeping(recipe: Recipe, grids: Mapping[str, StoredGrid]) -> Recipe:
    """The recipe with rules before its own that keep the layers of `grids`, one rule for each form."""
    layers: dict[Rule, list[str]] = {}
    for layer, grid in grids.items():
        layers.setdefault(grid.rule(()), []).append(layer)
    kept = tuple(dataclasses.replace(rule, layers=tuple(names)) for rule, names in layers.items())
    return dataclasses.replace(recipe, rules=(*kept, *recipe.rules))


def orders_of(grids: Mapping[str, StoredGrid]) -> dict[str, NDArray[np.int64]]:
    """The order of the inputs of each layer whose groups are scattered."""
    return {layer: grid.order for layer, grid in grids.items() if grid.order is not None}


def grid_of(grids: Sequence[StoredGrid]) -> Grid:
    """The grid of a weight [outputs, inputs] that is made of the outputs of one or more, in this order."""
    scales = np.concatenate([_rows(grid.scales) for grid in grids])
    points = [_rows(grid.zero_points) for grid in grids if grid.zero_points is not None]
    return Grid(grids[0].scheme, scales, np.concatenate(points) if points else None)


def _rows(array: LazyWeight) -> NDArray[Any]:
    return np.ascontiguousarray(array.numpy()).reshape(math.prod(array.dims[:-1]), array.dims[-1])

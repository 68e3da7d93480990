"""Weights as a bundle stores them: tables, a row for each output, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from satchel.runtime.bundle.dtypes import FLOAT32, INT8, UINT8
from satchel.runtime.bundle.layouts import dequantized
from satchel.runtime.bundle.onnx_wire import Tensor
from satchel.runtime.optimize.stored import Stored

OUTPUTS, INPUTS, GROUPS = 21, 96, 3
MIDDLE = {8: 128, 4: 8}
RANGES = [(3, 9), (16, 21)]


class Table:
    """A random table in one file, and its tensors by name."""

    def __init__(self, bits: int, *, zero_points: bool) -> None:
        rng = np.random.default_rng(bits)
        self.bits, self.content, self.tensors = bits, np.zeros(0, np.uint8), dict[str, Tensor]()
        self.values = rng.integers(0, 1 << bits, (OUTPUTS, INPUTS), np.uint8)
        self.scales = rng.uniform(0.1, 1, (OUTPUTS, GROUPS)).astype(np.float32)
        self.points = rng.integers(0, 1 << bits, (OUTPUTS, GROUPS), np.uint8)
        self.put("t.rows" if bits == 8 else "t.rows4", self.packed(self.values), UINT8.onnx)
        self.put("t.row_scales", self.scales, FLOAT32.onnx)
        if zero_points:
            self.put("t.row_zero_points", self.packed(self.points), UINT8.onnx)
        else:
            self.points[:] = MIDDLE[bits]

    def put(self, name: str, array: NDArray[Any], dtype: int) -> None:
        raw = array.reshape(-1).view(np.uint8)
        place = {"location": "w", "offset": str(len(self.content)), "length": str(len(raw))}
        self.tensors[name] = Tensor(name, array.shape, dtype, place, len(raw))
        self.content = np.concatenate([self.content, raw])

    def packed(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.bits == 8:
            return values
        even = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
        return np.ascontiguousarray(even[:, ::2] + 16 * even[:, 1::2])

    def floats(self) -> NDArray[np.float32]:
        steps = self.values.reshape(OUTPUTS, GROUPS, -1).astype(np.float32) - self.points[..., None]
        return (steps * self.scales[..., None]).reshape(OUTPUTS, INPUTS)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_table_is_read_a_few_outputs_at_a_time(bits: int, zero_points: bool) -> None:
    table = Table(bits, zero_points=zero_points)
    stored = Stored.of(table.tensors, "t")
    assert (stored.dims, stored.form.bits, stored.form.symmetric) == ((INPUTS, OUTPUTS), bits, not zero_points)
    found = stored.read(table.content, RANGES)
    wanted = np.concatenate([table.floats()[first:last] for first, last in RANGES])
    np.testing.assert_array_equal(dequantized(found), wanted.T)
    assert (found.form.groups, found.zero_points is None) == (GROUPS, not zero_points)


def test_what_linear_layers_read_comes_before_a_table() -> None:
    table = Table(8, zero_points=False)
    table.put("t.codes", np.zeros((INPUTS, OUTPUTS), np.int8), INT8.onnx)
    table.put("t.scales", np.ones(OUTPUTS, np.float32), FLOAT32.onnx)
    assert Stored.of(table.tensors, "t").form.groups == 1


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("t.rows", (OUTPUTS, INPUTS), INT8.onnx),
        ("t.rows", (OUTPUTS * INPUTS,), UINT8.onnx),
        ("t.row_scales", (OUTPUTS - 1, GROUPS), FLOAT32.onnx),
        ("t.row_scales", (OUTPUTS, GROUPS), UINT8.onnx),
        ("t.row_zero_points", (OUTPUTS, GROUPS + 1), UINT8.onnx),
    ],
)
def test_tensors_that_do_not_match_are_refused(name: str, shape: tuple[int, ...], dtype: int) -> None:
    table = Table(8, zero_points=True)
    table.tensors[name] = Tensor(name, shape, dtype, table.tensors[name].place, table.tensors[name].nbytes)
    with pytest.raises(ValueError, match="type"):
        Stored.of(table.tensors, "t")


def test_a_table_without_scales_is_refused() -> None:
    table = Table(8, zero_points=False)
    del table.tensors["t.row_scales"]
    with pytest.raises(KeyError):
        Stored.of(table.tensors, "t")

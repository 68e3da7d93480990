"""Each layout of quantized weights, made from what a bundle stores, against plain formulas."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.tiny_native_bundle import placed

from satchel.runtime.bundle import layouts
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.graph_specs import GraphSpec, Variant, VariantWeights
from satchel.runtime.bundle.layouts import Form, file_name, pack, parts
from satchel.runtime.errors import BundleError
from satchel.runtime.optimize import derived
from satchel.runtime.optimize.derived import make_weights

TYPES = {(8, True): TensorProto.INT8, (8, False): TensorProto.UINT8, (4, True): TensorProto.INT4}
TYPES |= {(4, False): TensorProto.UINT4}
NUMPY = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): 3,
}


def variant(layout: Layout) -> Variant:
    """A variant over weights in a layout; its graph is called as the layout."""
    graph = GraphSpec(f"{layout.value}.onnx", {}, None, (), ())
    return Variant("fast", ("prefill",), graph, VariantWeights(layout.value, file_name(layout)), (), None)


Parts = dict[str, np.ndarray]


@dataclasses.dataclass
class Case:
    """A weight [inputs, outputs]; `size` 0 means per-channel, else inputs of a group."""

    layout: Layout
    bits: int
    symmetric: bool
    inputs: int
    outputs: int
    size: int = 0
    gated: bool = False
    half_scales: bool = False


CASES = {
    "panels": Case(Layout.PANELS, 8, True, 24, 32),
    "panels, odd outputs": Case(Layout.PANELS, 8, True, 24, 37),
    "panels, inputs not a multiple of 4": Case(Layout.PANELS, 8, True, 23, 37),
    "panels, gated": Case(Layout.PANELS, 8, True, 10, 42, gated=True),
    "panels, groups of 8 bits with zero points": Case(Layout.PANELS, 8, False, 64, 21, 32),
    "panels, groups of 4 bits": Case(Layout.PANELS, 4, True, 64, 20, 32),
    "panels, groups of 4 bits with zero points": Case(Layout.PANELS, 4, False, 64, 20, 32),
    "panels, groups of 4 bits with zero points, odd outputs": Case(Layout.PANELS, 4, False, 32, 19, 8),
    "panels, groups of 4 bits, gated": Case(Layout.PANELS, 4, True, 32, 68, 32, gated=True),
    "panels, groups of 4 bits with zero points, gated": Case(Layout.PANELS, 4, False, 32, 46, 16, gated=True),
    "panels, scales in float16": Case(Layout.PANELS, 4, False, 64, 20, 32, half_scales=True),
    "panels, scales in float16, gated": Case(Layout.PANELS, 8, True, 32, 68, 32, gated=True, half_scales=True),
    "int8, scales in float16": Case(Layout.INT8, 4, True, 64, 21, 16, half_scales=True),
    "int8, groups of 4 bits": Case(Layout.INT8, 4, True, 64, 21, 16),
    "int8, groups of 4 bits with zero points": Case(Layout.INT8, 4, False, 64, 40, 32),
    "int8, groups of 8 bits with zero points": Case(Layout.INT8, 8, False, 64, 40, 32),
    "groups": Case(Layout.GROUPS, 8, True, 128, 40),
    "groups, the last one padded": Case(Layout.GROUPS, 8, True, 176, 37),
}


class Weight:
    """A random weight, in a folder with the three graphs from which its layout is made."""

    def __init__(self, folder: Path, case: Case) -> None:
        rng, zero = np.random.default_rng(7), 1 << case.bits - 1
        self.folder, self.case = folder, case
        low = -zero if case.symmetric else 0
        groups = case.inputs // case.size if case.size else 1
        self.values = rng.integers(low, low + 2 * zero, (case.inputs, case.outputs))
        self.scales = rng.uniform(0.5, 2, (groups, case.outputs)).astype(np.float16 if case.half_scales else np.float32)
        self.scales[:, 3] = 0  # an output of zeros
        self.zeros = None if case.symmetric else rng.integers(0, 2 * zero, (groups, case.outputs))
        dtype, scale_dims = TYPES[case.bits, case.symmetric], self.scales.shape if case.size else (case.outputs,)
        tensors = [("w.codes", dtype, self.values.shape, self._bytes(self.values))]
        tensors.append(("w.scales", NUMPY[self.scales.dtype], scale_dims, self.scales.tobytes()))
        if self.zeros is not None:
            tensors.append(("w.zero_points", dtype, self.zeros.shape, self._bytes(self.zeros)))
        self._write("weights.bin", tensors, "prefill", "decode")
        wanted = [(f"w{ending}", NUMPY[a.dtype], a.shape, a.tobytes()) for ending, a in expected(self).items()]
        self._write(file_name(case.layout), wanted, case.layout.value)
        (folder / file_name(case.layout)).unlink()

    def _bytes(self, values: np.ndarray) -> bytes:
        """As bundles store them: two of 4 bits in a byte, the low half first."""
        if self.case.bits == 8:
            return values.astype(np.uint8).tobytes()
        flat = [int(value) & 15 for value in values.ravel()] + [0] * (values.size % 2)
        return bytes(low | high << 4 for low, high in zip(flat[::2], flat[1::2], strict=True))

    def _write(self, file: str, tensors: list[Any], *graphs: str) -> None:
        content, stored = b"", []
        for name, dtype, dims, data in tensors:
            content += b"\0" * (-len(content) % 64)
            stored.append(placed(name, dtype, dims, file, len(content), len(data)))
            content += data
        (self.folder / file).write_bytes(content)
        for graph in graphs:
            model = helper.make_model(helper.make_graph([], graph, [], [], stored))
            (self.folder / f"{graph}.onnx").write_bytes(model.SerializeToString())

    @property
    def bundle(self) -> Any:
        def graph_path(graph: str) -> Path:
            return self.folder / f"{graph}.onnx"

        return SimpleNamespace(folder=self.folder, graph_path=graph_path, path=lambda name: self.folder / name)

    def made(self) -> Parts:
        """Make the file, and read its tensors from where the graph says that they are."""
        graph, path = self.case.layout.value, self.folder / file_name(self.case.layout)
        make_weights(self.bundle, variant(self.case.layout), path)
        model = onnx.load(self.folder / f"{graph}.onnx").graph
        return {t.name.removeprefix("w"): onnx.numpy_helper.to_array(t) for t in model.initializer}


def expected(weight: Weight) -> Parts:
    return {Layout.PANELS: panels, Layout.INT8: int8, Layout.GROUPS: groups}[weight.case.layout](weight)


def int8(weight: Weight) -> Parts:
    size = weight.case.size or weight.case.inputs
    zeros = 0 if weight.zeros is None else np.repeat(weight.zeros, size, axis=0)
    values = (weight.values - zeros).astype(np.float32) * np.repeat(weight.scales, size, axis=0)
    scales = np.maximum(np.abs(values).max(axis=0), np.float32(1e-10)) / np.float32(127)
    return {".int8": np.rint(values / scales).astype(np.int8), ".int8_scales": scales}


def groups(weight: Weight) -> Parts:
    count = -(-weight.case.inputs // 64)
    values = np.full((weight.case.outputs, count * 64), 128, np.uint8)
    for row, column in np.ndindex(weight.values.shape):
        values[column, row] = weight.values[row, column] + 128
    scales = np.tile(weight.scales[0, :, None], count)
    return {".block_codes": values.reshape(-1, count, 64), ".block_scales": scales}


def panels(weight: Weight) -> Parts:
    """By the words of the format, one number at a time."""
    case, zero = weight.case, 1 << weight.case.bits - 1
    half = case.outputs // 2 if case.gated else case.outputs
    split = [list(range(first, min(first + 16, half))) for first in range(0, half, 16)]
    if case.gated:
        split = [[column + shift for column in columns] for columns in split for shift in (0, half)]
    filler = zero if case.bits == 8 else zero | zero << 4
    rows = -(-case.inputs // (4 if case.bits == 8 else 8))
    values = np.full((len(split), rows, 16, 4), filler, np.uint8)
    scales = np.zeros((len(split), len(weight.scales), 16), weight.scales.dtype)
    zeros = np.full(scales.shape, zero, np.uint8)
    for panel, columns in enumerate(split):
        for place, column in enumerate(columns):
            scales[panel, :, place] = weight.scales[:, column]
            if weight.zeros is not None:
                zeros[panel, :, place] = weight.zeros[:, column]
            for row in range(case.inputs):
                value = int(weight.values[row, column]) + (zero if case.symmetric else 0)
                if case.bits == 8:
                    values[panel, row // 4, place, row % 4] = value
                else:
                    byte, high = int(values[panel, row // 8, place, row % 4]), row % 8 >= 4
                    values[panel, row // 8, place, row % 4] = byte & 15 | value << 4 if high else byte & 240 | value
    start = ".gated_panel" if case.gated else ".panel"
    found = {f"{start}s": values.reshape(len(split), -1), f"{start}_scales": scales}
    return found if case.symmetric else found | {f"{start}_zero_points": zeros}


@pytest.mark.parametrize("at_once", [1 << 22, 600])
@pytest.mark.parametrize("name", CASES)
def test_a_layout_holds_what_is_stored(
    name: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "VALUES_AT_ONCE", at_once)
    weight = Weight(tmp_path, CASES[name])
    made, wanted, case = weight.made(), expected(weight), weight.case
    form = Form(case.inputs, case.outputs, len(weight.scales), case.bits, case.symmetric, case.half_scales)
    said = {
        ending: (part.dtype.name, part.shape) for ending, part in parts(case.layout, form, gated=case.gated).items()
    }
    assert said == {ending: (array.dtype.name, array.shape) for ending, array in wanted.items()}
    assert made.keys() == wanted.keys()
    for ending, array in wanted.items():
        np.testing.assert_array_equal(made[ending], array, err_msg=ending)


@pytest.mark.parametrize(
    ("layout", "form", "gated"),
    [
        (Layout.GROUPS, Form(64, 16, 1, 4, True), False),
        (Layout.GROUPS, Form(64, 16, 2, 8, True), False),
        (Layout.PANELS, Form(60, 16, 1, 4, True), False),
        (Layout.PANELS, Form(64, 17, 1, 8, True), True),
        (Layout.INT8, Form(64, 16, 3, 8, True), False),
        (Layout.INT8, Form(64, 0, 1, 8, True), False),
    ],
)
def test_a_weight_that_a_layout_cannot_hold_is_an_error(layout: Layout, form: Form, gated: bool) -> None:
    with pytest.raises(ValueError, match=str(form.inputs)):
        parts(layout, form, gated=gated)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("panels", {"outputs": 48}),
        ("panels, groups of 4 bits", {"bits": 8}),
        ("panels, groups of 4 bits", {"size": 16}),
        ("panels, groups of 4 bits", {"symmetric": False}),
        ("panels, groups of 4 bits", {"half_scales": True}),
        ("panels, groups of 4 bits with zero points", {"symmetric": True}),
        ("groups", {"inputs": 64}),
    ],
)
def test_a_weight_of_another_shape_is_refused(name: str, other: dict[str, Any], tmp_path: Path) -> None:
    weight, graph = Weight(tmp_path, CASES[name]), CASES[name].layout.value
    content = (tmp_path / f"{graph}.onnx").read_bytes()
    Weight(tmp_path, dataclasses.replace(CASES[name], **other))
    (tmp_path / f"{graph}.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="the weight w of fast"):
        make_weights(weight.bundle, variant(weight.case.layout), tmp_path / file_name(weight.case.layout))


@pytest.mark.parametrize("change", [{"data_type": TensorProto.INT64}, {"dims": [5]}, {"dims": []}], ids=str)
@pytest.mark.parametrize("part", ["w.codes", "w.scales", "w.zero_points"])
def test_stored_tensors_that_do_not_fit_each_other_are_refused(
    part: str, change: dict[str, Any], tmp_path: Path
) -> None:
    weight = Weight(tmp_path, CASES["panels, groups of 4 bits with zero points"])
    for phase in ("prefill", "decode"):
        path = tmp_path / f"{phase}.onnx"
        model = onnx.load(path, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name == part)
        tensor.data_type = change.get("data_type", tensor.data_type)
        if "dims" in change:
            del tensor.dims[:]
            tensor.dims.extend(change["dims"])
        path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="the weight w"):
        make_weights(weight.bundle, variant(Layout.PANELS), tmp_path / "panels.bin")


def test_a_weight_in_float16_has_panels_of_halves_and_nothing_else() -> None:
    form = Form(inputs=24, outputs=37, groups=1, bits=16, symmetric=True)
    assert {ending: part.shape for ending, part in parts(Layout.PANELS, form).items()} == {".panels": (3, 24 * 32)}
    values = np.random.default_rng(1).standard_normal((24, 37)).astype(np.float16)
    made = pack(Layout.PANELS, layouts.Weight(values, np.ones((1, 37), np.float32), None, 16))[".panels"]
    found = made.view(np.float16).reshape(3, 24, 16)
    np.testing.assert_array_equal(found.transpose(1, 0, 2).reshape(24, 48)[:, :37], values)
    for layout in (Layout.INT8, Layout.GROUPS):
        with pytest.raises(ValueError, match="layout"):
            parts(layout, form)

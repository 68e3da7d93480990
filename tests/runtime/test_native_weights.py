"""Weights in panels: what is made of each way in which a bundle stores weights, against a plain loop."""

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

from satchel.runtime.errors import BundleError
from satchel.runtime.optimize import native
from satchel.runtime.optimize.native import NATIVE_NAME, make_native

TYPES = {(8, True): TensorProto.INT8, (8, False): TensorProto.UINT8, (4, True): TensorProto.INT4}
TYPES |= {(4, False): TensorProto.UINT4}


@dataclasses.dataclass
class Case:
    """A weight [inputs, outputs]; `block` 0 means one scale per output."""

    bits: int
    signed: bool
    inputs: int
    outputs: int
    block: int = 0
    gated: bool = False

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1


CASES = {
    "channel": Case(8, True, 24, 32),
    "channel, odd outputs": Case(8, True, 24, 37),
    "channel, inputs no multiple of 4": Case(8, True, 23, 37),
    "channel, gated": Case(8, True, 10, 42, gated=True),
    "blocks of 8 bits": Case(8, True, 64, 20, 32),
    "blocks of 8 bits with zero points": Case(8, False, 64, 21, 32),
    "blocks of 4 bits": Case(4, True, 64, 20, 32),
    "blocks of 4 bits, odd outputs": Case(4, True, 64, 21, 16),
    "blocks of 4 bits with zero points": Case(4, False, 64, 20, 32),
    "blocks of 4 bits with zero points, odd outputs": Case(4, False, 32, 19, 8),
    "blocks of 4 bits, gated": Case(4, True, 32, 68, 32, gated=True),
    "blocks of 4 bits with zero points, gated, odd halves": Case(4, False, 32, 46, 16, gated=True),
}


def nibbles(codes: np.ndarray) -> bytes:
    """Two codes in a byte, the low half first."""
    flat = [int(code) & 15 for code in codes.ravel()] + [0] * (codes.size % 2)
    return bytes(low | high << 4 for low, high in zip(flat[::2], flat[1::2], strict=True))


def panels_of(case: Case) -> list[list[int]]:
    """The outputs in each panel."""
    half = case.outputs // 2 if case.gated else case.outputs
    split = [list(range(first, min(first + 16, half))) for first in range(0, half, 16)]
    if not case.gated:
        return split
    return [[column + shift for column in columns] for columns in split for shift in (0, half)]


class Weight:
    """A random weight in a folder with the three graphs that the making reads."""

    def __init__(self, folder: Path, case: Case) -> None:
        rng = np.random.default_rng(7)
        self.folder, self.case = folder, case
        low = -case.middle if case.signed else 0
        blocks = case.inputs // case.block if case.block else 1
        self.codes = rng.integers(low, low + 2 * case.middle, (case.inputs, case.outputs))
        self.scales = rng.uniform(0.5, 2, (blocks, case.outputs)).astype(np.float32)
        self.zeros = rng.integers(0, 2 * case.middle, (blocks, case.outputs))
        dtype = TYPES[case.bits, case.signed]
        scale_dims = self.scales.shape if case.block else (case.outputs,)
        parts = [("w.codes", dtype, self.codes.shape, self._bytes(self.codes))]
        parts.append(("w.scales", TensorProto.FLOAT, scale_dims, self.scales.tobytes()))
        if not case.signed:
            parts.append(("w.zero_points", dtype, self.zeros.shape, self._bytes(self.zeros)))
        self._write("weights.bin", parts, ("prefill", "decode"))
        (folder / "native.bin").unlink(missing_ok=True)
        count = len(panels_of(case))
        size = 16 * (-(-case.inputs // 4) * 4) if case.bits == 8 else case.inputs * 8
        infix = ".gated_" if case.gated else "."
        made = [(f"w{infix}panels", TensorProto.UINT8, (count, size), bytes(count * size))]
        made.append((f"w{infix}panel_scales", TensorProto.FLOAT, (count, blocks, 16), bytes(count * blocks * 64)))
        if not case.signed:
            made.append(
                (f"w{infix}panel_zero_points", TensorProto.UINT8, (count, blocks, 16), bytes(count * blocks * 16))
            )
        self.dims = [dims for _, _, dims, _ in made]
        self._write(NATIVE_NAME, made, ("native",))
        (folder / NATIVE_NAME).unlink()

    def _bytes(self, codes: np.ndarray) -> bytes:
        return nibbles(codes) if self.case.bits == 4 else codes.astype(np.uint8).tobytes()

    def _write(self, file: str, parts: list[Any], graphs: tuple[str, ...]) -> None:
        content, tensors = b"", []
        for name, dtype, dims, data in parts:
            content += b"\0" * (-len(content) % 64)
            tensors.append(placed(name, dtype, dims, file, len(content), len(data)))
            content += data
        (self.folder / file).write_bytes(content)
        for phase in graphs:
            model = helper.make_model(helper.make_graph([], phase, [], [], tensors))
            (self.folder / f"{phase}.onnx").write_bytes(model.SerializeToString())

    @property
    def bundle(self) -> Any:
        def graph_path(phase: str) -> Path:
            return self.folder / f"{phase}.onnx"

        return SimpleNamespace(folder=self.folder, graph_path=graph_path, path=lambda name: self.folder / name)

    def made(self) -> list[np.ndarray]:
        """Make the file, and read its tensors from where the graph says that they are."""
        make_native(self.bundle, self.folder / NATIVE_NAME)
        content = (self.folder / NATIVE_NAME).read_bytes()
        found = []
        graph = onnx.load(self.folder / "native.onnx", load_external_data=False).graph
        for tensor, dims in zip(graph.initializer, self.dims, strict=True):
            place = {entry.key: entry.value for entry in tensor.external_data}
            part = content[int(place["offset"]) : int(place["offset"]) + int(place["length"])]
            dtype = np.float32 if tensor.data_type == TensorProto.FLOAT else np.uint8
            found.append(np.frombuffer(part, dtype).reshape(dims))
        return found

    def expected(self) -> list[np.ndarray]:
        """The same by the words of the format, one number at a time."""
        case, shift = self.case, self.case.middle if self.case.signed else 0
        found = [np.zeros(dims, np.float32 if index == 1 else np.uint8) for index, dims in enumerate(self.dims)]
        for panel, columns in enumerate(panels_of(case)):
            groups = found[0][panel].reshape(-1, 16, 4)
            groups[:] = case.middle if case.bits == 8 else case.middle | case.middle << 4
            for place, column in enumerate(columns):
                for row in range(case.inputs):
                    code = int(self.codes[row, column]) + shift
                    if case.bits == 8:
                        groups[row // 4, place, row % 4] = code
                    else:
                        byte, high = int(groups[row // 8, place, row % 4]), row % 8 >= 4
                        groups[row // 8, place, row % 4] = byte & 15 | code << 4 if high else byte & 240 | code
            if len(found) == 3:
                found[2][panel] = case.middle
            for place, column in enumerate(columns):
                found[1][panel, :, place] = self.scales[:, column]
                if len(found) == 3:
                    found[2][panel, :, place] = self.zeros[:, column]
        return found


@pytest.mark.parametrize("at_once", [1 << 22, 600])
@pytest.mark.parametrize("name", CASES)
def test_panels_hold_what_is_stored(name: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CODES_AT_ONCE", at_once)
    weight = Weight(tmp_path, CASES[name])
    for made, expected in zip(weight.made(), weight.expected(), strict=True):
        np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("channel", {"outputs": 48}),
        ("channel", {"inputs": 28}),
        ("blocks of 4 bits", {"bits": 8}),
        ("blocks of 4 bits", {"block": 16}),
        ("blocks of 4 bits", {"signed": False}),
        ("blocks of 4 bits with zero points", {"signed": True}),
    ],
)
def test_a_weight_of_another_shape_is_refused(name: str, other: dict[str, Any], tmp_path: Path) -> None:
    weight = Weight(tmp_path, CASES[name])
    graph = (tmp_path / "native.onnx").read_bytes()
    Weight(tmp_path, dataclasses.replace(CASES[name], **other))
    (tmp_path / "native.onnx").write_bytes(graph)
    with pytest.raises(
        BundleError, match=r"graphs.native has a weight w that prefill has not: export the bundle again"
    ):
        make_native(weight.bundle, tmp_path / NATIVE_NAME)

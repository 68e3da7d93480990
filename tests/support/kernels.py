"""Single operators of satchel's own library, run through ONNX Runtime, and what numpy says in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from support.native_ops import ACTIVATIONS, FINE_LEVELS, LEVELS, mixed, rounded_rows

from satchel.runtime.kernels.library import SWITCH, instruction_set, instruction_sets, library

needs_kernels = pytest.mark.own_kernels


def equal_in_all_sets(run: Callable[[], list[NDArray[Any]]], but: str = "") -> None:
    """Run with each instruction set that this machine has, and compare the bits with those of the fastest.

    NaNs are equal to each other. The set `but` is left out.
    """
    names = [name for name in instruction_sets() if name != but]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, names[0])
        fastest, wanted, ran = instruction_set(), run(), []
        for name in names:
            patch.setenv(SWITCH, name)
            if instruction_set() != fastest:
                for found, values in zip(run(), wanted, strict=True):
                    np.testing.assert_array_equal(found, values, err_msg=name)
                ran.append(name)
        assert "plain" in ran
    instruction_set()


def operator_session(
    name: str,
    attributes: Mapping[str, Any],
    inputs: list[str],
    feeds: Mapping[str, NDArray[Any]],
    constants: Mapping[str, NDArray[Any]],
    *,
    outputs: tuple[str, ...] = ("y",),
    threads: int = 2,
    kind: int = onnx.TensorProto.FLOAT,
) -> ort.InferenceSession:
    """A graph of one operator; `inputs` are names, "" where one is left out, of what is fed or constant.

    All dimensions of what is fed may vary. Outputs are of the type `kind`.
    """
    node = helper.make_node(name, inputs, list(outputs), domain="satchel")
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    graph = helper.make_graph(
        [node],
        "operator",
        [
            helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
            for key, value in feeds.items()
        ],
        [helper.make_tensor_value_info(output, kind, None) for output in outputs],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("satchel", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("satchel.helpers", str(threads - 1))
    options.register_custom_ops_library(str(found()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def found() -> Path:
    """The library, for tests that are marked with `needs_kernels`."""
    path = library()
    if path is None:
        raise ValueError("the test is not marked with needs_kernels")
    return path


OF_INPUTS = ("optional", "half_scales")


@dataclasses.dataclass(frozen=True)
class Product:
    """One satchel:Linear with random weights, and what it is to give.

    Attributes as those of the operator; `bits` 8 or 4; `optional`: which of the optional inputs there are, by letter:
    z, b, r and g for zero points, bias, residual and gain. `half_scales`: Scales are in float16.
    """

    inputs: int
    outputs: int
    bits: int = 8
    block: int = 0
    epsilon: float = 0.0
    hadamard: int = 0
    gate: str = ""
    optional: str = ""
    half_scales: bool = False

    @property
    def width(self) -> int:
        return self.outputs // 2 if self.gate else self.outputs

    @property
    def attributes(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in OF_INPUTS}

    @property
    def names(self) -> list[str]:
        return ["x", "codes", "scales", *(letter if letter in self.optional else "" for letter in "zbrg")]

    def codes(self, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.floating[Any]], NDArray[np.uint8]]:
        """Codes [outputs, inputs], scales and zero points [outputs, blocks]."""
        rng, blocks = np.random.default_rng(seed), self.inputs // self.block if self.block else 1
        codes = rng.integers(0, 1 << self.bits, (self.outputs, self.inputs), np.uint8)
        dtype = np.float16 if self.half_scales else np.float32
        scales = rng.uniform(0.001, 0.011, (self.outputs, blocks)).astype(dtype)
        middle = np.full((self.outputs, blocks), 1 << (self.bits - 1), np.uint8)
        zeros = rng.integers(0, 1 << self.bits, middle.shape, np.uint8) if "z" in self.optional else middle
        return codes, scales, zeros

    def constants(self, seed: int) -> dict[str, NDArray[Any]]:
        codes, scales, zeros = self.codes(seed)
        rng = np.random.default_rng(seed + 1)
        values: dict[str, NDArray[Any]] = {
            "codes": self._panels(codes),
            "scales": self._by_panel(scales),
            "z": self._by_panel(zeros),
            "b": rng.standard_normal(self.outputs).astype(np.float32),
            "g": rng.standard_normal(self.inputs).astype(np.float32),
        }
        return {key: value for key, value in values.items() if key in self.names}

    def _places(self) -> list[int]:
        """The output in each row of the panels, -1 where there is none."""
        halves = [range(self.width), range(self.width, self.outputs)] if self.gate else [range(self.width)]
        padded = [[*half, *[-1] * (-len(half) % 16)] for half in halves]
        return [row for first in range(0, len(padded[0]), 16) for half in padded for row in half[first : first + 16]]

    def _panels(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Byte by byte as docs/kernels.md says."""
        places, groups = self._places(), -(-self.inputs // 4)
        panels = np.full((len(places) // 16, groups, 16, 4), 1 << (self.bits - 1), np.uint8)
        for row, output in enumerate(places):
            for k in range(self.inputs if output >= 0 else 0):
                panels[row // 16, k // 4, row % 16, k % 4] = codes[output, k]
        if self.bits == 8:
            return panels.reshape(len(panels), -1)
        low, high = panels[:, 0::2], panels[:, 1::2]
        return (low | high << 4).reshape(len(panels), -1)

    def _by_panel(self, values: NDArray[Any]) -> NDArray[Any]:
        places = self._places()
        result = np.zeros((len(places) // 16, values.shape[1], 16), values.dtype)
        for row, output in enumerate(places):
            if output >= 0:
                result[row // 16, :, row % 16] = values[output]
        return result

    def feeds(self, rows: int, seed: int, *, single: bool = False) -> dict[str, NDArray[Any]]:
        """A prompt [1, rows, inputs], or with `single` as many rows of one token each."""
        rng, shape = np.random.default_rng(seed + 2), (rows, 1) if single else (1, rows)
        values = {"x": rng.standard_normal((*shape, self.inputs)).astype(np.float32)}
        if "r" in self.optional:
            values["r"] = rng.standard_normal((*shape, self.width)).astype(np.float32)
        return values

    def session(self, seed: int, feeds: Mapping[str, NDArray[Any]], threads: int = 2) -> ort.InferenceSession:
        return operator_session("Linear", self.attributes, self.names, feeds, self.constants(seed), threads=threads)

    def expected(self, seed: int, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """The result in float64, of activations rounded as the operator says.

        Those of single tokens with one scale are rounded to 16 bits.
        """
        codes, scales, zeros = self.codes(seed)
        constants = self.constants(seed)
        single, shape = feeds["x"].shape[-2] == 1, feeds["x"].shape[:-1]
        x = feeds["x"].astype(np.float64).reshape(-1, self.inputs)
        if self.epsilon:
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * constants.get("g", 1.0)
        x = mixed(x, self.hadamard) if self.hadamard else x
        x = rounded_rows(x, self.block, FINE_LEVELS if single and not self.block else LEVELS)
        steps = codes.reshape(self.outputs, scales.shape[1], -1) - zeros[..., None].astype(np.float64)
        weight = (steps * scales[..., None].astype(np.float64)).reshape(self.outputs, self.inputs)
        y = x @ weight.T + constants.get("b", 0.0)
        if self.gate:
            y = ACTIVATIONS[self.gate](y[:, : self.width]) * y[:, self.width :]
        return y.reshape(*shape, self.width) + feeds.get("r", 0.0)

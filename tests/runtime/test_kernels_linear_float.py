"""satchel:Linear and satchel:TableLinear over weights in float16, against numpy in float64."""

import dataclasses
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from support.kernels import equal_in_all_sets, needs_kernels, operator_session
from support.native_ops import ACTIVATIONS, mixed

pytestmark = needs_kernels

TOLERANCE = 2e-6
"""Of the largest number: 600 roundings to float32, one after another, add up to sqrt(600) * 2^-24 = 1.5e-6."""


@dataclasses.dataclass(frozen=True)
class Half:
    """One Linear of 16 bits; `optional`: b, r and g for bias, residual and norm weight."""

    inputs: int
    outputs: int
    epsilon: float = 0.0
    hadamard: int = 0
    gate: str = ""
    optional: str = ""

    @property
    def attributes(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "optional"} | {"bits": 16}

    @property
    def names(self) -> list[str]:
        return ["x", "panels", "", "", *(letter if letter in self.optional else "" for letter in "brg")]

    @property
    def width(self) -> int:
        return self.outputs // 2 if self.gate else self.outputs

    def weight(self) -> NDArray[np.float16]:
        """[outputs, inputs], with subnormal numbers and zeros."""
        weight = np.random.default_rng(1).standard_normal((self.outputs, self.inputs)).astype(np.float16)
        weight[0], weight[:, 0], weight[-1, ::2] = weight[0] * np.float16(2**-14), 0, -0.0
        return weight

    def constants(self) -> dict[str, NDArray[Any]]:
        rng, parts = np.random.default_rng(2), np.split(self.weight(), 2 if self.gate else 1)
        padded = [np.pad(part, ((0, -len(part) % 16), (0, 0))).reshape(-1, 16, self.inputs) for part in parts]
        panels = np.ascontiguousarray(np.stack(padded, axis=1).reshape(-1, 16, self.inputs).transpose(0, 2, 1))
        values: dict[str, NDArray[Any]] = {
            "panels": panels.reshape(len(panels), -1).view(np.uint8),
            "b": rng.standard_normal(self.outputs).astype(np.float32),
            "g": rng.standard_normal(self.inputs).astype(np.float32),
        }
        return {key: value for key, value in values.items() if key in self.names}

    def feeds(self, rows: int) -> dict[str, NDArray[np.float32]]:
        rng = np.random.default_rng(rows)
        values = {"x": rng.standard_normal((1, rows, self.inputs)).astype(np.float32)}
        if "r" in self.optional:
            values["r"] = rng.standard_normal((1, rows, self.width)).astype(np.float32)
        return values

    def session(self, feeds: dict[str, NDArray[np.float32]], threads: int = 2) -> ort.InferenceSession:
        return operator_session("Linear", self.attributes, self.names, feeds, self.constants(), threads=threads)

    def expected(self, feeds: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
        x, constants = feeds["x"][0].astype(np.float64), self.constants()
        if self.epsilon:
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * constants.get("g", 1.0)
        x = mixed(x, self.hadamard) if self.hadamard else x
        y = x @ self.weight().T.astype(np.float64) + constants.get("b", 0.0)
        if self.gate:
            y = ACTIVATIONS[self.gate](y[:, : self.width]) * y[:, self.width :]
        return y[None] + feeds.get("r", 0.0)


HALVES = [
    Half(64, 160),
    Half(600, 48, optional="br"),
    Half(30, 50, epsilon=1e-5, optional="gb"),
    Half(256, 96, epsilon=1e-5, hadamard=64),
    Half(70, 2 * 37, gate="silu", optional="br"),
    Half(33, 2 * 64, gate="gelu_tanh", epsilon=1e-6, optional="g"),
    Half(1, 1),
]
ROWS = (1, 2, 3, 5, 12, 13, 99, 400)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_what_numpy_says(half: Half, rows: int) -> None:
    feeds = half.feeds(rows)
    found, expected = half.session(feeds).run(None, feeds)[0], half.expected(feeds)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_all_instruction_sets_give_the_same_bits(half: Half) -> None:
    for rows in (1, 2, 11, 29):
        feeds = half.feeds(rows)
        equal_in_all_sets(lambda feeds=feeds: half.session(feeds).run(None, feeds))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_row_gets_what_it_gets_alone(half: Half) -> None:
    for rows in (2, 4, 12, 203):
        feeds = half.feeds(rows)
        together, alone = half.session(feeds).run(None, feeds)[0], half.session(feeds, threads=1)
        for row in (0, rows // 2, rows - 1):
            found = alone.run(None, {name: value[:, row : row + 1] for name, value in feeds.items()})[0]
            np.testing.assert_array_equal(found[:, 0], together[:, row])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite_stay_so(value: float) -> None:
    half = Half(32, 32)
    constants = half.constants()
    constants["panels"].view(np.float16).reshape(2, 32, 16)[1, 7, 3] = value
    feeds = {"x": np.ones((1, 3, 32), np.float32)}

    def run() -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = operator_session("Linear", half.attributes, half.names, feeds, constants).run(
            None, feeds
        )
        return found

    found = run()[0]
    np.testing.assert_array_equal(found[..., 19], np.full((1, 3), value, np.float32))
    assert np.isfinite(np.delete(found, 19, axis=-1)).all()
    equal_in_all_sets(run)


def test_no_rows_give_none() -> None:
    feeds = {"x": np.zeros((0, 64), np.float32)}
    assert Half(64, 32).session(feeds).run(None, feeds)[0].shape == (0, 32)


@pytest.mark.parametrize("changes", [{"block": 32}, {"bits": 15}], ids=str)
def test_attributes_that_do_not_go_together_are_refused(changes: dict[str, int]) -> None:
    half = Half(64, 32)
    with pytest.raises(Exception, match=r"satchel:Linear: .*attributes"):
        operator_session("Linear", half.attributes | changes, half.names, half.feeds(1), half.constants())


def test_scales_are_refused_and_so_are_panels_of_another_size() -> None:
    half = Half(64, 32)
    feeds: dict[str, NDArray[Any]] = {**half.feeds(1), **half.constants(), "s": np.ones((2, 1, 16), np.float32)}
    session = operator_session("Linear", half.attributes, ["x", "panels", "s"], feeds, {})
    with pytest.raises(Exception, match="weight"):
        session.run(None, feeds)
    small = {"x": feeds["x"], "panels": feeds["panels"][:, :-2]}
    session = operator_session("Linear", half.attributes, ["x", "panels"], small, {})
    with pytest.raises(Exception, match="weight"):
        session.run(None, small)


TABLES = [(64, 300), (30, 41), (576, 1000), (7, 1)]


@pytest.mark.parametrize(("inputs", "outputs"), TABLES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_table_is_multiplied_as_numpy_says(inputs: int, outputs: int, rows: int) -> None:
    rng = np.random.default_rng(5)
    table = rng.standard_normal((outputs, inputs)).astype(np.float16)
    feeds = {"x": rng.standard_normal((rows, 1, inputs)).astype(np.float32)}
    sizes = {"inputs": inputs, "outputs": outputs, "block": 0}

    def run(feeds: dict[str, NDArray[Any]] = feeds) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = operator_session("TableLinear", sizes, ["x", "table"], feeds, {"table": table}).run(
            None, feeds
        )
        return found

    found, expected = run()[0], feeds["x"].astype(np.float64) @ table.T.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    for row in range(rows):
        np.testing.assert_array_equal(run({"x": feeds["x"][row : row + 1]})[0], found[row : row + 1])
    equal_in_all_sets(run)


def test_a_table_of_another_type_or_size_is_refused() -> None:
    sizes, x = {"inputs": 64, "outputs": 32, "block": 0}, np.ones((1, 64), np.float32)
    for table, message in ((np.ones((32, 64), np.uint8), "type"), (np.ones((32, 63), np.float16), "table")):
        session = operator_session("TableLinear", sizes, ["x", "table"], {"x": x}, {"table": table})
        with pytest.raises(Exception, match=message):
            session.run(None, {"x": x})

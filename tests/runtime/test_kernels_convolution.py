"""satchel:CausalConv against numpy in float64."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from support.kernels import equal_in_all_sets, needs_kernels, operator_session

pytestmark = needs_kernels

Feeds = dict[str, NDArray[np.float32]]
NAMES = ["x", "weight", "bias", "past"]


def feeds(batch: int, tokens: int, channels: int, width: int, seed: int = 0, bias: bool = True) -> Feeds:
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (batch, tokens, channels), "weight": (channels, 1, width), "bias": (channels,),
        "past": (batch, width - 1, channels),
    }  # fmt: skip
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return made if bias else {name: value for name, value in made.items() if name != "bias"}


def session(given: Feeds, activation: str = "", threads: int = 2) -> ort.InferenceSession:
    names = [name if name in given else "" for name in NAMES]
    attributes = {"activation": activation} if activation else {}
    return operator_session("CausalConv", attributes, names, given, {}, outputs=("y", "present"), threads=threads)


def expected(given: Feeds, activation: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, weight, past = (given[name].astype(np.float64) for name in ("x", "weight", "past"))
    every, width, tokens = np.concatenate([past, x], 1), weight.shape[2], x.shape[1]
    y = sum(every[:, w : w + tokens] * weight[:, 0, w] for w in range(width)) + given.get("bias", 0)
    return y / (1 + np.exp(-y)) if activation else y, every[:, tokens:]


@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize(("channels", "width"), [(16, 4), (300, 3), (7, 2), (129, 32)])
def test_it_is_what_numpy_says(channels: int, width: int, tokens: int, bias: bool, activation: str) -> None:
    given = feeds(2, tokens, channels, width, bias=bias)
    (y, present), (wanted, state) = session(given, activation).run(None, given), expected(given, activation)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(present, state.astype(np.float32))


@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize(("channels", "width"), [(300, 3), (7, 2), (129, 32)])
def test_all_instruction_sets_give_the_same_bits(channels: int, width: int, activation: str) -> None:
    given = feeds(2, 40, channels, width)
    given["x"][0, 3, 1:3] = np.nan, np.inf
    equal_in_all_sets(lambda: session(given, activation).run(None, given))


@pytest.mark.parametrize("cuts", [(1,) * 9, (2, 1, 6)], ids=str)
def test_chunks_and_rows_alone_give_the_same_bits_in_place(cuts: tuple[int, ...]) -> None:
    given = feeds(2, 9, 140, 4)
    together, states = session(given, "silu").run(None, given)
    row = {name: value[1:] if name in ("x", "past") else value for name, value in given.items()}
    alone = session(row, "silu", threads=1)
    state, start = ort.OrtValue.ortvalue_from_numpy(row["past"].copy()), 0
    for count in cuts:
        binding = alone.io_binding()
        for name in ("weight", "bias"):
            binding.bind_cpu_input(name, row[name])
        binding.bind_cpu_input("x", row["x"][:, start : start + count].copy())
        binding.bind_ortvalue_input("past", state)
        binding.bind_output("y")
        binding.bind_ortvalue_output("present", state)
        alone.run_with_iobinding(binding)
        np.testing.assert_array_equal(binding.get_outputs()[0].numpy(), together[1:, start : start + count])
        start += count
    np.testing.assert_array_equal(state.numpy(), states[1:])


@pytest.mark.parametrize(("batch", "tokens", "channels"), [(0, 3, 16), (2, 0, 16), (2, 3, 0)])
def test_nothing_gives_nothing(batch: int, tokens: int, channels: int) -> None:
    given = feeds(batch, tokens, channels, 4)
    y, present = session(given).run(None, given)
    assert y.shape == (batch, tokens, channels)
    if not tokens:
        np.testing.assert_array_equal(present, given["past"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (2, 16)}, "input"),
        ({"weight": (15, 1, 4)}, "weight"),
        ({"weight": (16, 2, 4)}, "weight"),
        ({"weight": (16, 4)}, "weight"),
        ({"weight": (16, 1, 1), "past": (2, 0, 16)}, "weight"),
        ({"weight": (16, 1, 33), "past": (2, 32, 16)}, "weight"),
        ({"bias": (15,)}, "bias"),
        ({"past": (2, 4, 16)}, "past"),
        ({"past": (1, 3, 16)}, "past"),
        ({"past": (2, 48)}, "past"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(changed: dict[str, tuple[int, ...]], message: str) -> None:
    given = feeds(2, 3, 16, 4)
    given |= {name: np.zeros(shape, np.float32) for name, shape in changed.items()}
    with pytest.raises(Exception, match=f"satchel:CausalConv: .*{message}"):
        session(given).run(None, given)


def test_an_unknown_activation_and_an_absent_past_are_refused() -> None:
    given = feeds(2, 3, 16, 4)
    with pytest.raises(Exception, match="satchel:CausalConv: unknown activation"):
        session(given, "relu")
    del given["past"]
    with pytest.raises(Exception, match="satchel:CausalConv: the past"):
        session(given).run(None, given)


@pytest.mark.parametrize("width", [2, 4, 9])
@pytest.mark.parametrize("tokens", [2, 5, 16])
def test_rows_over_one_state_are_the_next_tokens_bit_for_bit(width: int, tokens: int) -> None:
    given = feeds(1, tokens, 40, width)
    rows = given | {"x": np.ascontiguousarray(given["x"].swapaxes(0, 1))}
    together, last = session(rows, "silu").run(None, rows)
    expected, state = session(given, "silu").run(None, given)
    np.testing.assert_array_equal(together[:, 0], expected[0])
    np.testing.assert_array_equal(last, state)

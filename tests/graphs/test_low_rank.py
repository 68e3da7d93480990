"""What adapters add to a weight goes through the same changes as the weight itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from satchel.graphs.ir.low_rank import CHANGES, Change, LowRank, changes_of
from satchel.graphs.ir.weights import (
    LazyWeight,
    concatenated,
    from_array,
    left_multiplied,
    mapped,
    right_multiplied,
    scaled,
    transposed,
)
from satchel.graphs.passes.quantize.order_inputs import _ordered

INPUTS, OUTPUTS, RANK = 6, 8, 2
RANDOM = np.random.default_rng(5)


def random(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


FIRST, SECOND, BIAS, BASE = random(INPUTS, RANK), random(RANK, OUTPUTS), random(1, OUTPUTS), random(INPUTS, OUTPUTS)
FOUR, THREE = random(4, 4), random(3, 3)
FACTORS = {size: from_array("factors", random(size)) for size in (INPUTS, OUTPUTS)}

Edit = Callable[[LazyWeight], LazyWeight]
EDITS: dict[str, Edit] = {
    "rows scaled": lambda w: scaled(w, FACTORS[INPUTS], "w"),
    "columns scaled": lambda w: scaled(w, FACTORS[OUTPUTS], "w", -1),
    "rows mixed": lambda w: left_multiplied(w, THREE, "w"),
    "columns mixed": lambda w: right_multiplied(w, FOUR, "w"),
    "some columns mixed": lambda w: right_multiplied(w, FOUR, "w", (4, 8)),
    "turned twice": lambda w: transposed(transposed(w, "w"), "w"),
    "rows in order": lambda w: _ordered(w, np.array([3, 1, 5, 0, 2, 4])),
}
JOINED: dict[str, Edit] = {
    "columns scaled": lambda w: scaled(w, from_array("factors", np.arange(20, dtype=np.float32)), "w", -1),
    "all columns mixed": lambda w: right_multiplied(w, FOUR, "w"),
    "those of the last mixed": lambda w: right_multiplied(w, FOUR, "w", (12, 20)),
    "those of others mixed": lambda w: right_multiplied(w, FOUR, "w", (0, 4)),
    "rows mixed": lambda w: left_multiplied(w, THREE, "w"),
}


def marked(base: np.ndarray = BASE, layer: str = "layer") -> LazyWeight:
    weight = from_array("w", base)
    part = LowRank(from_array("a", FIRST), from_array("b", SECOND), from_array("c", BIAS))
    weight.meta[CHANGES] = (Change(layer, {"one": part}, 0, OUTPUTS),)
    return weight


def added(weight: LazyWeight) -> tuple[np.ndarray, np.ndarray]:
    """What the marks add to a weight and to its bias, both over all outputs."""
    matrix, bias = np.zeros(weight.dims, np.float32), np.zeros((1, weight.dims[1]), np.float32)
    for change in changes_of(weight):
        part = change.adapters["one"]
        assert part.bias is not None
        matrix[:, change.start : change.stop] += part.first.numpy() @ part.second.numpy()
        bias[:, change.start : change.stop] += part.bias.numpy()
    return matrix, bias


@pytest.mark.parametrize("name", EDITS)
def test_a_change_of_the_weight_changes_what_is_added(name: str) -> None:
    edit = EDITS[name]
    matrix, bias = added(edit(marked()))
    np.testing.assert_allclose(matrix, edit(from_array("w", FIRST @ SECOND)).numpy(), atol=1e-5)
    outputs_only = "rows" not in name
    wanted = edit(from_array("w", np.repeat(BIAS, INPUTS, 0))).numpy()[:1] if outputs_only else BIAS
    np.testing.assert_allclose(bias, wanted, atol=1e-5)


@pytest.mark.parametrize("name", JOINED)
def test_joined_layers_keep_what_is_added_to_each(name: str) -> None:
    plain = from_array("p", random(INPUTS, 4))
    edited = JOINED[name](concatenated([plain, marked(), marked(layer="other")], 1, "w"))
    product = np.concatenate([np.zeros((INPUTS, 4), np.float32), FIRST @ SECOND, FIRST @ SECOND], 1)
    assert [change.layer for change in changes_of(edited)] == ["layer", "other"]
    np.testing.assert_allclose(added(edited)[0], JOINED[name](from_array("w", product)).numpy(), atol=1e-4)


def test_a_change_that_is_not_followed_is_lost() -> None:
    joined = concatenated([from_array("p", random(INPUTS, 2)), marked()], 1, "w")
    assert changes_of(right_multiplied(joined, random(5, 5), "w")) == ()  # mixes outputs of two layers
    assert changes_of(mapped(marked(), np.tanh, "w")) == ()
    assert changes_of(scaled(transposed(marked(), "w"), FACTORS[OUTPUTS], "w")) == ()
    assert changes_of(concatenated([marked(), marked()], 0, "w")) == ()

"""lower_convolution: a causal convolution keeps the last inputs as its state, and goes on where it stopped."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, convolution, fired, normal, run, tag, the, untouched

from satchel.graphs.passes.fuse.lower_convolution import lower_convolution

CHANNELS, WIDTH, TOKENS = 6, 4, 9
WEIGHT, BIAS, X = normal(1, CHANNELS, WIDTH), normal(2, CHANNELS), normal(3, 2, TOKENS, CHANNELS)
TEXT = """(float[batch,sequence,6] x) => (float[batch,sequence,6] y) <int64[1] axis = {1},
    float[batch,sequence,6] c> { c = satchel.Convolution<layer = 3, silu = 1>(x, w, b) y = Neg(c) }"""


def graph(*changes: tuple[str, str], weight: np.ndarray = WEIGHT) -> ir.Model:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return build(text, w=weight, b=BIAS)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cuts", [(9,), (1, 8), (2, 1, 1, 5), (5, 4)], ids=str)
def test_chunks_give_what_all_tokens_at_once_give(cuts: tuple[int, ...], bias: bool, silu: bool) -> None:
    changes = ([] if silu else [("silu = 1", "silu = 0")]) + ([] if bias else [("(x, w, b)", "(x, w)")])
    after = fired(lower_convolution, graph(*changes), 1, keeps_signature=False).model
    past, parts = np.zeros((2, WIDTH - 1, CHANNELS), np.float32), []
    for part in np.split(X, np.cumsum(cuts)[:-1], axis=1):
        outputs = run(after, {"x": part, "past.3.conv": past})
        parts.append(outputs["y"])
        past = outputs["present.3.conv"]
    wanted = np.stack([-convolution(row, WEIGHT, BIAS if bias else None, silu) for row in X])
    np.testing.assert_allclose(np.concatenate(parts, 1), wanted, rtol=1e-5, atol=1e-6)


def test_a_weight_of_three_axes_in_the_checkpoint_is_read_as_it_is() -> None:
    three = WEIGHT[:, None]
    model = graph(("c = ", "flat = Squeeze(w, axis) c = "), ("(x, w, b)", "(x, flat, b)"), weight=three)
    after = fired(lower_convolution, model, 1, keeps_signature=False).model
    assert the(after, "CausalConvWithState").inputs[1].name == "w"  # type: ignore[union-attr]
    found = run(after, {"x": X, "past.3.conv": np.zeros((2, WIDTH - 1, CHANNELS), np.float32)})["y"]
    np.testing.assert_allclose(found[1], -convolution(X[1], WEIGHT, BIAS, True), rtol=1e-5, atol=1e-6)


def test_a_convolution_of_one_token_is_refused() -> None:
    (reason,) = untouched(lower_convolution, graph(weight=WEIGHT[:, :1]))
    assert "[6, 1]" in reason


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(lower_convolution, tag(graph(), "Convolution", "dilation", 2))
    assert "dilation" in reason

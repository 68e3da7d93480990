"""lower_attention_static: a layer over a whole cache, in standard operators without varying shapes, means the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.attention_graphs import TOTAL, Layer
from support.graphs import fired, operators, session, tag, the, untouched

from satchel.graphs.ir.inputs import Lengths
from satchel.graphs.passes.cache.drop_inputs import drop_inputs
from satchel.graphs.passes.static.expand_attention import expand_attention
from satchel.graphs.passes.static.fix_shapes import fix_shapes
from satchel.graphs.passes.static.lower_attention_static import lower_attention_static

CAPACITY = TOTAL + 3
LAYERS = {
    "shared heads": Layer(width=7, value_width=5),
    "one head for all": Layer(heads=3, kv_heads=1, width=7, value_width=5),
    "a head for each": Layer(heads=3, kv_heads=3, width=7, value_width=5),
    "window": Layer(width=7, value_width=5, window=4),
    "window of one": Layer(width=7, value_width=5, window=1),
    "window beyond the cache": Layer(width=7, value_width=5, window=CAPACITY),
    "softcap": Layer(width=7, value_width=5, softcap=0.7),
    "another scale": Layer(width=7, value_width=5, scale=1.3),
}
PLAIN = LAYERS["shared heads"]


def fixed(model: ir.Model, tokens: int) -> ir.Model:
    """The layer with its cache, its shapes in numbers."""
    return fix_shapes(Lengths(tokens, CAPACITY))(expand_attention(model).model).model


def stepped(model: ir.Model, layer: Layer, tokens: int) -> np.ndarray:
    """The output for all of the layer's tokens, fed in chunks of `tokens`, the last one padded."""
    opened, given = session(model), layer.tokens()
    inputs = {value.name: value.shape for value in opened.get_inputs()}
    outputs = [value.name for value in opened.get_outputs()]
    cache = {name: np.full(shape, 1e3, np.float32) for name, shape in inputs.items() if name.startswith("past_")}
    keys, parts = np.arange(CAPACITY), []
    for start in range(0, TOTAL, tokens):
        count = min(tokens, TOTAL - start)
        queries = start + np.arange(tokens)[:, None]
        seen = (keys <= queries) & (keys > queries - (layer.window or CAPACITY))
        feeds = {
            **{n: np.pad(a[:, start : start + count], ((0, 0), (0, tokens - count), (0, 0))) for n, a in given.items()},
            **cache,
            "cache_rows": ((keys >= start) & (keys < start + count)).reshape(1, 1, -1, 1),
            "cache_index": np.clip(keys - start, 0, tokens - 1),
            **{n: np.where(seen, 0, -30000).astype(np.float32)[None, None] for n in inputs if n.startswith("mask")},
        }
        found = dict(zip(outputs, opened.run(outputs, {n: feeds[n] for n in inputs}), strict=True))
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
        parts.append(found["y"][0, :count])
    return np.concatenate(parts)


@pytest.mark.parametrize("tokens", [1, 4, TOTAL])
@pytest.mark.parametrize("name", LAYERS)
def test_the_static_layer_is_the_plain_one(name: str, tokens: int) -> None:
    layer = LAYERS[name]
    after = fired(lower_attention_static, fixed(layer.graph(), tokens), 1, keeps_signature=False).model
    after = drop_inputs(after).model
    assert not {"Attention", "TensorScatter", "Shape", "Range", "Expand"} & set(operators(after))
    assert operators(after)["Gather"] == (2 if tokens > 1 else 0)
    np.testing.assert_allclose(stepped(after, layer, tokens), layer.plain(layer.tokens()), rtol=1e-5, atol=2e-6)


def test_shapes_that_vary_are_refused() -> None:
    (reason,) = untouched(lower_attention_static, expand_attention(PLAIN.graph()).model)
    assert reason == "the sizes of its heads and of its cache are not numbers"


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(lower_attention_static, tag(fixed(PLAIN.graph(), 4), "Attention", "is_causal", 1))
    assert "is_causal" in reason


def test_a_cache_that_is_written_in_a_circle_is_refused() -> None:
    (reason,) = untouched(lower_attention_static, tag(fixed(PLAIN.graph(), 4), "TensorScatter", "mode", "circular"))
    assert reason == "the cache is not written along its positions"


def test_another_mask_is_refused() -> None:
    model = fixed(PLAIN.graph(), 4)
    the(model, "LessOrEqual").op_type = "Less"
    (reason,) = untouched(lower_attention_static, model)
    assert reason == "its mask is neither causal nor a window over the cache's positions"


def test_keys_that_no_cache_holds_are_refused() -> None:
    model = fixed(PLAIN.graph(), 4)
    node = the(model, "Attention")
    node.replace_input_with(1, model.graph.inputs[-1])
    (reason,) = untouched(lower_attention_static, model)
    assert "TensorScatter" in reason

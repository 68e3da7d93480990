"""expand_attention: layers beyond the fused operator become TensorScatter and Attention, and mean the same."""

from __future__ import annotations

import numpy as np
import pytest
from support.attention_graphs import BATCH, TOTAL, Cached, Layer
from support.graphs import fired, operators, tag, the, untouched

from satchel.graphs.passes.static.expand_attention import expand_attention

LAYERS = {
    "narrower values": Layer(width=7, value_width=5),
    "wider values": Layer(width=5, value_width=11),
    "one head for all": Layer(heads=3, kv_heads=1, width=7, value_width=5),
    "window": Layer(width=7, value_width=5, window=4),
    "window of one": Layer(width=7, value_width=5, window=1),
    "window as long as the sequence": Layer(width=7, value_width=5, window=TOTAL),
    "softcap": Layer(width=7, value_width=5, softcap=0.7),
    "another scale": Layer(width=7, value_width=5, scale=1.3),
    "rotation": Layer(width=10, value_width=5, rotary=10),
    "all at once": Layer(width=14, value_width=5, rotary=10, pairs=True, window=4, softcap=0.7, scale=0.9),
}
CHUNKS = {"at once": (), "in chunks": (5, 9), "one token last": (TOTAL - 1,), "one by one": tuple(range(1, TOTAL))}
PLAIN = LAYERS["narrower values"]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_expanded_layer_is_the_plain_one_up_to_a_full_cache(name: str, chunks: str) -> None:
    layer = LAYERS[name]
    after = fired(expand_attention, layer.graph(), 1, keeps_signature=False).model
    assert operators(after)["TensorScatter"] == 2
    assert operators(after)["Attention"] == 1
    assert not [node for node in after.graph if node.domain]
    tokens = layer.tokens()
    found = Cached(after).feed_chunks(tokens, *CHUNKS[chunks])
    np.testing.assert_allclose(found[0], layer.plain(tokens), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("capacity", [TOTAL, TOTAL + 4])
@pytest.mark.parametrize("name", ["narrower values", "all at once"])
def test_rows_of_different_lengths_keep_to_their_own_tokens(name: str, capacity: int) -> None:
    layer = LAYERS[name]
    tokens = layer.tokens(BATCH)
    cached = Cached(expand_attention(layer.graph()).model, BATCH, capacity)
    lengths = [3, 7]
    prompt = cached.feed({n: a[:, : max(lengths)] for n, a in tokens.items()}, lengths)
    new = {n: np.stack([a[row, length : length + 1] for row, length in enumerate(lengths)]) for n, a in tokens.items()}
    step = cached.feed(new, [length + 1 for length in lengths])
    for row, length in enumerate(lengths):
        wanted = layer.plain(tokens, row, length + 1)
        np.testing.assert_allclose(prompt[row, :length], wanted[:length], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(step[row, 0], wanted[-1], rtol=1e-5, atol=2e-6)


def test_heads_that_do_not_divide_are_refused() -> None:
    (reason,) = untouched(expand_attention, Layer(heads=5, width=7, value_width=5).graph())
    assert reason.startswith("5 query heads cannot be shared out over 2 key, 2 value heads")


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(expand_attention, tag(PLAIN.graph(), "Attention", "sinks", 1))
    assert "sinks" in reason


def test_heads_of_unknown_number_are_refused() -> None:
    model = PLAIN.graph()
    value = the(model, "Attention").inputs[2]
    assert value is not None
    value.shape = None
    assert untouched(expand_attention, model) == ["the number or width of its heads is not known"]


def test_layers_share_their_mask_if_they_have_the_same_window() -> None:
    layer = LAYERS["window"]
    attention = "= satchel.Attention<layer = {}, scale = 0.31, window = {}, softcap = 0.0>(q_moved, k_moved, v_moved)"
    third, fourth, fifth = attention.format(3, 4), attention.format(4, 4), attention.format(5, 0)
    shapes = ("] mixed>", "] mixed, float[batch,sequence,6,5] b, float[batch,sequence,6,5] c>")
    nodes = (f"mixed {third}", f"mixed {third} b {fourth} c {fifth} s = Add(mixed, b) sum = Add(s, c)")
    model = layer.graph(shapes, nodes, ("(mixed, out_shape)", "(sum, out_shape)"))
    after = fired(expand_attention, model, 3, keeps_signature=False).model
    assert operators(after)["LessOrEqual"] == 2  # one with the window, one without
    tokens = layer.tokens()
    found = Cached(after).feed_chunks(tokens, 5)[0]
    whole = Layer(width=7, value_width=5)
    np.testing.assert_allclose(found, 2 * layer.plain(tokens) + whole.plain(tokens), rtol=1e-5, atol=4e-6)

"""fuse_attention: a layer becomes GroupQueryAttention over its KV cache, with everything that changes its numbers."""

from __future__ import annotations

import numpy as np
import pytest
from support.attention_graphs import BATCH, TOTAL, Cached, Layer
from support.graphs import fired, operators, rotation_tables, tag, the, untouched

from satchel.graphs.passes.fuse.fuse_attention import fuse_attention

PLAIN = Layer()
LAYERS = {
    "plain": PLAIN,
    "one head for all": Layer(kv_heads=1),
    "a head each": Layer(heads=3, kv_heads=3),
    "window": Layer(window=4),
    "window of one": Layer(window=1),
    "window as long as the sequence": Layer(window=TOTAL),
    "softcap": Layer(softcap=0.7),
    "window and softcap": Layer(window=5, softcap=0.7),
    "another scale": Layer(scale=1.3),
    "width of 24": Layer(width=24, value_width=24),
    "rotation": Layer(rotary=16),
    "rotation of pairs": Layer(rotary=16, pairs=True),
    "rotation of some channels": Layer(width=48, value_width=48, rotary=16),
    "all at once": Layer(width=32, value_width=32, rotary=16, pairs=True, window=4, softcap=0.7, scale=0.9),
}
CHUNKS = {"at once": (), "in chunks": (5, 9), "one token last": (TOTAL - 1,), "one by one": tuple(range(1, TOTAL))}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_fused_layer_is_the_plain_one_up_to_a_full_cache(name: str, chunks: str) -> None:
    layer = LAYERS[name]
    after = fired(fuse_attention, layer.graph(), 1, keeps_signature=False).model
    assert operators(after)["com.microsoft::GroupQueryAttention"] == 1
    tokens = layer.tokens()
    found = Cached(after).feed_chunks(tokens, *CHUNKS[chunks])
    np.testing.assert_allclose(found[0], layer.plain(tokens), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["plain", "all at once"])
def test_rows_of_different_lengths_keep_to_their_own_tokens(name: str) -> None:
    layer = LAYERS[name]
    tokens = layer.tokens(BATCH)
    cached = Cached(fuse_attention(layer.graph()).model, BATCH)
    lengths = [3, 7]
    prompt = cached.feed({n: a[:, : max(lengths)] for n, a in tokens.items()}, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(prompt[row, :length], layer.plain(tokens, row, length), rtol=1e-5, atol=2e-6)
    new = {n: np.stack([a[row, length : length + 1] for row, length in enumerate(lengths)]) for n, a in tokens.items()}
    step = cached.feed(new, [length + 1 for length in lengths])
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(step[row, 0], layer.plain(tokens, row, length + 1)[-1], rtol=1e-5, atol=2e-6)


MOVED = {
    "in two steps": "v_moved = Transpose<perm = [0, 1, 3, 2]>(v_turned) mixed = ",
    "by other operators": "sizes = Abs(v_first) signs = Sign(v_first) v_moved = Mul(sizes, signs) mixed = ",
}


@pytest.mark.parametrize("name", MOVED)
def test_heads_that_are_moved_otherwise_are_moved_back(name: str) -> None:
    first = (
        "v_turned = Transpose<perm = [0, 2, 3, 1]>"
        if name == "in two steps"
        else "v_first = Transpose<perm = [0, 2, 1, 3]>"
    )
    model = PLAIN.graph(("v_moved = Transpose<perm = [0, 2, 1, 3]>", first), ("mixed = ", MOVED[name]))
    after = fired(fuse_attention, model, 1, keeps_signature=False).model
    assert operators(after)["Transpose"] == (3 if name == "in two steps" else 2)
    tokens = PLAIN.tokens()
    np.testing.assert_allclose(Cached(after).feed_chunks(tokens, 5)[0], PLAIN.plain(tokens), rtol=1e-5, atol=2e-6)


REFUSED = {
    "values of another width": (Layer(value_width=24), "keys are 16 wide and values 24"),
    "a width that is no multiple of 8": (Layer(width=20, value_width=20), "heads are 20 channels wide"),
    "heads that do not divide": (Layer(heads=5), "5 query heads cannot be shared out over 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_the_operator_cannot_do_is_refused(name: str) -> None:
    layer, reason = REFUSED[name]
    (found,) = untouched(fuse_attention, layer.graph())
    assert reason in found


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(fuse_attention, tag(PLAIN.graph(), "Attention", "sinks", 1))
    assert "sinks" in reason


def test_heads_of_unknown_number_are_refused() -> None:
    model = PLAIN.graph()
    the(model, "Attention").inputs[1].shape = None
    assert untouched(fuse_attention, model) == ["the number or width of its heads is not known"]


ROTARY = Layer(rotary=16)
OUTSIDE = {
    "tables of the key differ": [("(k_moved, cos, sin", "(k_moved, other, sin")],
    "positions differ": [("(k_moved, cos, sin, position_ids)", "(k_moved, cos, sin, shifted)")],
    "positions are not the graph's": [("cos, sin, position_ids)", "cos, sin, shifted)")],
    "pairs in the key alone": [
        ("k_turned = RotaryEmbedding<interleaved = 0", "k_turned = RotaryEmbedding<interleaved = 1")
    ],
    "only the query turns": [("(q_turned, k_turned, v_moved)", "(q_turned, k_moved, v_moved)")],
    "only the key turns": [("(q_turned, k_turned, v_moved)", "(q_moved, k_turned, v_moved)")],
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_rotations_that_differ_stay_outside(name: str) -> None:
    other = rotation_tables(8, 17, 16)[0][:, :8]
    start = ("q_heads = Reshape", "sign = Sign(input_ids) shifted = Add(position_ids, sign) q_heads = Reshape")
    model = ROTARY.graph(*OUTSIDE[name], start, other=other)
    after = fired(fuse_attention, model, 1, keeps_signature=False).model
    assert operators(after)["RotaryEmbedding"] == (1 if "only" in name else 2)
    assert the(after, "GroupQueryAttention").attributes["do_rotary"].value == 0


def test_a_rotation_without_positions_stays_outside() -> None:
    cos, sin = (np.tile(t[None, :5], (1, 1, 1)) for t in ROTARY.tables().values())
    model = ROTARY.graph((", position_ids)", ")"), cos=cos, sin=sin)
    assert operators(fired(fuse_attention, model, 1, keeps_signature=False).model)["RotaryEmbedding"] == 2


@pytest.mark.parametrize(
    "layer",
    [
        Layer(width=24, value_width=24, rotary=24),
        Layer(width=24, value_width=24, rotary=16),
        Layer(width=32, value_width=32, rotary=24),
        Layer(rotary=8),
    ],
    ids=["heads of 24", "16 of 24 channels", "24 of 32 channels", "8 of 16 channels"],
)
def test_a_width_that_the_operator_does_not_rotate_stays_outside_and_says_why(layer: Layer) -> None:
    result = fired(fuse_attention, layer.graph(), 1, keeps_signature=False)
    (refusal,) = result.refusals
    assert refusal.reason.startswith("its rotation stays outside: GroupQueryAttention rotates")
    assert f"not {layer.rotary} of {layer.width}" in refusal.reason
    tokens = layer.tokens()
    found = Cached(result.model).feed_chunks(tokens, 5, 12)
    np.testing.assert_allclose(found[0], layer.plain(tokens), rtol=1e-5, atol=2e-6)


def test_a_rotation_with_an_unknown_attribute_stays_outside_and_says_why() -> None:
    result = fired(fuse_attention, tag(ROTARY.graph(), "RotaryEmbedding", "novelty", 1), 1, keeps_signature=False)
    assert ["novelty" in refusal.reason for refusal in result.refusals] == [True]
    assert operators(result.model)["RotaryEmbedding"] == 2


def test_two_layers_share_the_lengths() -> None:
    attention = "= satchel.Attention<layer = {}, scale = 0.31, window = 0, softcap = 0.0>(q_moved, k_moved, v_moved)"
    third, fourth = attention.format(3), attention.format(4)
    shapes = ("] mixed>", "] mixed, float[batch,sequence,6,16] other>")
    both = (f"mixed {third}", f"mixed {third} other {fourth} sum = Add(mixed, other)")
    model = PLAIN.graph(shapes, both, ("(mixed, out_shape)", "(sum, out_shape)"))
    after = fired(fuse_attention, model, 2, keeps_signature=False).model
    assert operators(after)["ReduceSum"] == 1
    assert len(after.graph.inputs) == 6 + 4

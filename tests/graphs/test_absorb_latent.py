"""absorb_latent: attention over a cache of latents gives what attention over each head's keys and values does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.attention_graphs import BATCH, TOTAL, Cached
from support.graphs import attention, build, fired, normal, operators, tag, untouched

from satchel.graphs.passes.fuse.absorb_latent import absorb_latent

HEADS, OWN, SHARED, VALUE, LATENT, SCALE = 3, 5, 4, 6, 7, 0.31
INPUTS = {"q": HEADS * (OWN + SHARED), "c": LATENT, "r": SHARED}
MATRIX = normal(9, LATENT, HEADS * (OWN + VALUE))
NODES = f"""
    q_heads = Reshape(q, q_shape) query = Transpose<perm = [0, 2, 1, 3]>(q_heads)
    kv = MatMul(c, W) kv_heads = Reshape(kv, kv_shape) turned = Transpose<perm = [0, 2, 1, 3]>(kv_heads)
    own, value = Split<axis = -1>(turned, parts)
    r_heads = Reshape(r, r_shape) shared = Transpose<perm = [0, 2, 1, 3]>(r_heads)
    shape = Shape(own) front = Slice(shape, zeros, threes) width = Constant<value_ints = [{SHARED}]>()
    whole = Concat<axis = 0>(front, width) copied = Expand(shared, whole)
    key = Concat<axis = 3>(own, copied)
    mixed = satchel.Attention<layer = 3, scale = {SCALE}, window = 0, softcap = 0.0>(query, key, value)
    y = Reshape(mixed, out_shape)"""
CHUNKS = {"at once": (), "in chunks": (5, 9), "one token last": (TOTAL - 1,), "one by one": tuple(range(1, TOTAL))}


def graph(*changes: tuple[str, str]) -> ir.Model:
    """The layer as the tracer writes it, with some pieces of its text replaced."""
    inputs = ", ".join(f"float[batch,sequence,{width}] {name}" for name, width in INPUTS.items())
    text = f"""({inputs}, int64[batch,sequence] input_ids, int64[batch,sequence] position_ids,
        int64[batch,total] attention_mask) => (float[batch,sequence,{HEADS * VALUE}] y)
        <int64[4] q_shape = {{0, 0, {HEADS}, {OWN + SHARED}}}, int64[4] kv_shape = {{0, 0, {HEADS}, {OWN + VALUE}}},
         int64[4] r_shape = {{0, 0, 1, {SHARED}}}, int64[2] parts = {{{OWN}, {VALUE}}}, int64[1] zeros = {{0}},
         int64[1] threes = {{3}}, int64[3] out_shape = {{0, 0, {HEADS * VALUE}}},
         float[batch,{HEADS},sequence,{SHARED}] copied, float[batch,{HEADS},sequence,{OWN + SHARED}] key,
         float[batch,sequence,{HEADS},{VALUE}] mixed> {{ {NODES} }}"""
    return build(text, *changes, W=MATRIX)


def tokens(batch: int = 1) -> dict[str, np.ndarray]:
    return {name: normal(seed, batch, TOTAL, width) for seed, (name, width) in enumerate(INPUTS.items())}


def plain(given: dict[str, np.ndarray], row: int = 0, length: int = TOTAL) -> np.ndarray:
    """The layer in numpy, without a cache: [length, heads * value]."""
    query = given["q"][row, :length].reshape(length, HEADS, OWN + SHARED).swapaxes(0, 1)
    kv = (given["c"][row, :length] @ MATRIX).reshape(length, HEADS, OWN + VALUE).swapaxes(0, 1)
    shared = np.broadcast_to(given["r"][row, :length], (HEADS, length, SHARED))
    key = np.concatenate([kv[..., :OWN], shared], axis=-1)
    return attention(query, key, kv[..., OWN:], SCALE).reshape(length, -1)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_the_layer_keeps_latents_and_means_the_same(chunks: str) -> None:
    after = fired(absorb_latent(), graph(), 1, keeps_signature=False).model
    cached = Cached(after)
    assert {name: array.shape for name, array in cached.cache.items()} == {
        "past_key_values.3.key": (1, 1, TOTAL, LATENT + SHARED)
    }
    assert not [node for node in after.graph if node.domain == "satchel"]
    given = tokens()
    np.testing.assert_allclose(cached.feed_chunks(given, *CHUNKS[chunks])[0], plain(given), rtol=1e-5, atol=5e-6)


def test_a_latent_with_an_axis_of_heads_and_keys_in_another_order_mean_the_same() -> None:
    model = graph(
        ("kv = MatMul(c, W)", "one = Constant<value_ints = [1]>() c4 = Unsqueeze(c, one) kv = MatMul(c4, W)"),
        ("kv_heads = Reshape(kv, kv_shape)", "kv3 = Squeeze(kv, one) kv_heads = Reshape(kv3, kv_shape)"),
    )
    assert "straight" in untouched(absorb_latent(), model)[0]  # a Squeeze stands between
    other = graph(("Concat<axis = 3>(own, copied)", "Concat<axis = 3>(copied, own)"))
    after = fired(absorb_latent(), other, 1, keeps_signature=False).model
    given = tokens()
    heads = given["q"].reshape(1, TOTAL, HEADS, OWN + SHARED)
    moved = np.concatenate([heads[..., OWN:], heads[..., :OWN]], axis=-1).reshape(given["q"].shape)
    found = Cached(after).feed_chunks(given | {"q": moved}, 5)
    np.testing.assert_allclose(found[0], plain(given), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("capacity", [TOTAL, TOTAL + 4])
def test_rows_of_different_lengths_keep_to_their_own_tokens(capacity: int) -> None:
    given, lengths = tokens(BATCH), [3, 7]
    cached = Cached(absorb_latent()(graph()).model, BATCH, capacity)
    prompt = cached.feed({n: a[:, : max(lengths)] for n, a in given.items()}, lengths)
    new = {n: np.stack([a[row, length : length + 1] for row, length in enumerate(lengths)]) for n, a in given.items()}
    step = cached.feed(new, [length + 1 for length in lengths])
    for row, length in enumerate(lengths):
        wanted = plain(given, row, length + 1)
        np.testing.assert_allclose(prompt[row, :length], wanted[:length], rtol=1e-5, atol=5e-6)
        np.testing.assert_allclose(step[row, 0], wanted[-1], rtol=1e-5, atol=5e-6)


def test_queries_that_are_joined_as_keys_are_need_no_slices() -> None:
    model = graph(
        ("query = Transpose<perm = [0, 2, 1, 3]>(q_heads)",
         "whole_query = Transpose<perm = [0, 2, 1, 3]>(q_heads) q_parts = Constant<value_ints = [5, 4]>() "
         "q_own, q_shared = Split<axis = -1>(whole_query, q_parts) query = Concat<axis = -1>(q_own, q_shared)"),
    )  # fmt: skip
    after = fired(absorb_latent(), model, 1, keeps_signature=False).model
    assert operators(after)["Slice"] == 2  # of the cache and of what attention gives
    given = tokens()
    np.testing.assert_allclose(Cached(after).feed_chunks(given, 5)[0], plain(given), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ((("window = 0", "window = 4"),), "window"),
        ((("softcap = 0.0", "softcap = 0.7"),), "softcap"),
        ((("kv = MatMul(c, W)", "kv0 = MatMul(c, W) kv = Relu(kv0)"),), "not come straight"),
        ((("turned = Transpose<perm = [0, 2, 1, 3]>(kv_heads)",
           "once = Transpose<perm = [0, 2, 1, 3]>(kv_heads) turned = Relu(once)"),), "not come straight"),
        ((("(query, key, value)", "(query, key, bent)"), ("key = Concat", "bent = Relu(value) key = Concat")),
         "not channels of one"),
        ((("Expand(shared, whole)", "Expand(shared, whole) bent = Relu(own)"), ("(own, copied)", "(bent, copied)")),
         "not channels of one"),
    ],
)  # fmt: skip
def test_a_layer_of_another_form_is_refused(changes: tuple[tuple[str, str], ...], reason: str) -> None:
    (found,) = untouched(absorb_latent(), graph(*changes))
    assert reason in found


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(absorb_latent(), tag(graph(), "Attention", "bias", 1))
    assert "bias" in reason


def test_a_latent_that_is_not_smaller_is_kept_on_demand_only() -> None:
    model = _one_head()
    (reason,) = untouched(absorb_latent(), model)
    assert "11 numbers per token, its keys and values 11" in reason
    fired(absorb_latent(always=True), model, 1, keeps_signature=False)


def _one_head() -> ir.Model:
    """A layer with one head, whose keys and values have 11 numbers for each token, as its latent has."""
    text = """(float[batch,sequence,6] q, float[batch,sequence,7] c, float[batch,1,sequence,4] r,
        int64[batch,sequence] input_ids, int64[batch,sequence] position_ids, int64[batch,total] attention_mask)
        => (float[batch,sequence,5] y)
        <int64[4] q_shape = {0, 0, 1, 6}, int64[4] kv_shape = {0, 0, 1, 7}, int64[2] parts = {2, 5},
         int64[4] same = {1, 1, 1, 1}, int64[3] out_shape = {0, 0, 5}, float[batch,1,sequence,4] copied,
         float[batch,1,sequence,6] key, float[batch,sequence,1,5] mixed> {
        q_heads = Reshape(q, q_shape) query = Transpose<perm = [0, 2, 1, 3]>(q_heads)
        kv = MatMul(c, W) kv_heads = Reshape(kv, kv_shape) turned = Transpose<perm = [0, 2, 1, 3]>(kv_heads)
        own, value = Split<axis = -1>(turned, parts) copied = Expand(r, same) key = Concat<axis = 3>(own, copied)
        mixed = satchel.Attention<layer = 3, scale = 0.3, window = 0, softcap = 0.0>(query, key, value)
        y = Reshape(mixed, out_shape) }"""
    return build(text, W=normal(9, 7, 7))


def test_a_layer_whose_keys_have_no_shared_part_is_ignored() -> None:
    assert untouched(absorb_latent(), graph(("Expand(shared, whole)", "Relu(own)"), ("(own, copied)", "(own, own)"),
                                            (f"{SHARED}] copied", f"{OWN}] copied"),
                                            (f"{OWN + SHARED}] key", f"{2 * OWN}] key"))) == []  # fmt: skip

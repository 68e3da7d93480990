"""slice_last_logits: the head works on each row's last real token only."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, expose, fired, normal, run, untouched

from satchel.graphs.passes.logits.slice_last_logits import slice_last_logits

HIDDEN, VOCABULARY = 7, 11
WEIGHTS = {
    "table": normal(1, VOCABULARY, HIDDEN),
    "scale": normal(2, HIDDEN),
    "head": normal(3, HIDDEN, VOCABULARY),
    "bias": normal(4, VOCABULARY),
    "square": normal(5, HIDDEN, HIDDEN),
}
HEAD = "(int64[batch,sequence] input_ids, int64[batch,total] attention_mask) => (float[batch,sequence,11] logits)"
CONSTANTS = "float cap = {2.5}, int64[1] last = {-1}, float[1,1,1] cube = {2.0}"
NORM = "n = RMSNormalization<axis = -1>(h, scale)"
PRODUCT = "logits = MatMul(n, head)"
SOFTCAP = "p = MatMul(n, head) d = Div(p, cap) t = Tanh(d) logits = Mul(t, cap)"


def head(nodes: str = f"{NORM} {PRODUCT}", inputs: str = HEAD, **weights: np.ndarray) -> ir.Model:
    """input_ids -> Gather -> Relu -> h -> `nodes` -> logits."""
    text = f"{inputs} <{CONSTANTS}> {{ e = Gather(table, input_ids) h = Relu(e) {nodes} }}"
    return build(text, **(WEIGHTS | weights))


def feeds(new: int, *lengths: int) -> dict[str, np.ndarray]:
    """`new` tokens a row, padded on the right; each row is `lengths` long with what the cache holds."""
    total = max(new, *lengths)
    ids = np.random.default_rng(6).integers(0, VOCABULARY, (len(lengths), new))
    return {"input_ids": ids, "attention_mask": (np.arange(total) < np.asarray(lengths)[:, None]).astype(np.int64)}


CASES = {
    "one row": (feeds(5, 5), [4]),
    "rows padded on the right": (feeds(5, 3, 5, 1), [2, 4, 0]),
    "one token": (feeds(1, 1), [0]),
    "a chunk over a past": (feeds(3, 13), [2]),
    "one token each over pasts": (feeds(1, 13, 4), [0, 0]),
}
SPELLINGS = {
    "norm and product": f"{NORM} {PRODUCT}",
    "product alone": "logits = MatMul(h, head)",
    "bias": f"{NORM} p = MatMul(n, head) logits = Add(bias, p)",
    "softcap": f"{NORM} {SOFTCAP}",
    "layer norm": f"n = LayerNormalization<axis = 2>(h, scale) {PRODUCT}",
    "tied head": f"{NORM} logits = com.microsoft.FusedMatMul<transB = 1>(n, table)",
    "scaled": f"{NORM} p = MatMul(n, head) q = Div(cap, p) logits = Sub(bias, q)",
    "transform": f"m = MatMul(h, square) n = RMSNormalization(m, scale) {PRODUCT}",
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_logits_are_those_of_the_last_real_token(name: str, case: str) -> None:
    given, last = CASES[case]
    model = head(SPELLINGS[name])
    found, wanted = run(fired(slice_last_logits, model, 1).model, given)["logits"], run(model, given)["logits"]
    assert found.shape == (len(last), 1, VOCABULARY)
    np.testing.assert_allclose(found[:, 0], wanted[np.arange(len(last)), last], rtol=1e-5, atol=1e-6)


STOPS = {
    "softmax over the tokens": (f"m = Softmax<axis = 1>(h) {PRODUCT.replace('n,', 'm,')}", "m"),
    "a norm over more axes": (f"m = RMSNormalization<axis = 1>(h, scale) {PRODUCT.replace('n,', 'm,')}", "m"),
    "a sum with another input": (f"m = Add(h, e) {PRODUCT.replace('n,', 'm,')}", "m"),
    "a scale for each token": (f"m = Mul(h, rows) {PRODUCT.replace('n,', 'm,')}", "m"),
    "a norm's scale for each token": (f"m = RMSNormalization(h, rows) {PRODUCT.replace('n,', 'm,')}", "m"),
    "a value with two readers": (f"{NORM} p = MatMul(n, head) q = MatMul(n, head) logits = Add(p, q)", None),
    "a computed matrix": (f"m = Neg(head) {NORM} logits = MatMul(n, m)", None),
    "a batch of matrices": (f"{NORM} logits = MatMul(n, cubes)", None),
    "the matrix first": ("m = Transpose<perm = [0, 2, 1]>(h) logits = MatMul(square, m)", None),
    "another attribute": ("logits = com.microsoft.FusedMatMul<transB = 1, transA = 1>(h, table)", None),
}


@pytest.mark.parametrize("name", STOPS)
def test_the_slice_stops_where_tokens_mix(name: str) -> None:
    nodes, start = STOPS[name]
    inputs = HEAD.replace("sequence", "7") if name == "the matrix first" else HEAD
    inputs = inputs.replace("batch,7,11", "batch,7,7") if name == "the matrix first" else inputs
    inputs = inputs.replace("sequence", "5") if "each token" in name else inputs
    cubes = normal(7, 2, HIDDEN, VOCABULARY)
    model = head(nodes, inputs, cubes=cubes, rows=normal(8, 5, HIDDEN))
    if start is None:
        assert untouched(slice_last_logits, model) == []
    else:
        after = fired(slice_last_logits, model, 1).model
        assert after.graph.node("last_token").inputs[0].producer().inputs[0].name == start


def test_a_value_that_is_an_output_too_keeps_all_its_tokens() -> None:
    model = expose(head(), "n")
    after = fired(slice_last_logits, model, 1).model
    given, last = CASES["rows padded on the right"]
    assert run(after, given)["n"].shape == (3, 5, HIDDEN)
    np.testing.assert_allclose(
        run(after, given)["logits"][:, 0], run(model, given)["logits"][range(3), last], rtol=1e-5, atol=1e-6
    )


def test_logits_made_by_something_else_are_left_alone() -> None:
    assert untouched(slice_last_logits, head(f"{NORM} p = MatMul(n, head) logits = Softmax<axis = 1>(p)")) == []

"""assign: each weight of a product, a table or experts learns which rule of a recipe counts for it."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, normal, serialized

from satchel.graphs.ir.values import weight
from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.quant.assign import assign, layer_name, layers_of, rule_of
from satchel.graphs.quant.recipe import Recipe, Rule

WEIGHTS = {
    "embed__weight": normal(1, 9, 4),
    "a__weight__T": normal(2, 4, 6),
    "b__weight__T": normal(3, 6, 4),
    "head__weight__T": normal(4, 4, 9),
    "norm__weight": normal(5, 4),
}
TEXT = """(int64[batch,sequence] ids) => (float[batch,sequence,9] logits) {
    e = Gather("embed.weight", ids) n = Mul(e, "norm.weight")
    p = MatMul(n, "a.weight.T") q = MatMul(p, "b.weight.T") r = Add(n, q)
    logits = MatMul(r, "head.weight.T")
}"""
KINDS = Recipe(
    "kinds",
    (Rule(kinds=("embedding",), bits=8), Rule(kinds=("head",), bits=8, blocks=(16,)), Rule(kinds=("linear",), bits=4)),
)


def model(text: str = TEXT) -> ir.Model:
    return build(text, **{name: array for name, array in WEIGHTS.items() if f'"{name.replace("__", ".")}"' in text})


def lazy(model: ir.Model, name: str) -> LazyWeight:
    found = weight(model.graph.initializers[name])
    assert found is not None
    return found


def marked(recipe: Recipe, before: ir.Model, count: int) -> ir.Model:
    """The marked model, after what every pass owes: the graph is as it was, and a second run finds nothing to do."""
    content = serialized(before)
    result = assign(recipe)(before)
    assert result.count == count
    assert serialized(result.model) == content
    assert assign(recipe)(result.model).count == 0
    return result.model


@pytest.mark.parametrize(
    ("name", "index"), [("embed.weight", 0), ("head.weight.T", 1), ("a.weight.T", 2), ("b.weight.T", 2)]
)
def test_the_rule_of_a_weight_goes_by_its_kind(name: str, index: int) -> None:
    assert rule_of(lazy(marked(KINDS, model(), 4), name)) is KINDS.rules[index]


def test_the_first_rule_that_matches_the_layer_counts() -> None:
    recipe = Recipe("mine", (Rule(("b",), bits=8), Rule(bits=4)))
    after = marked(recipe, model(), 4)
    assert [rule_of(lazy(after, f"{name}.weight.T")) for name in "ab"] == [recipe.rules[1], recipe.rules[0]]


def test_another_recipe_replaces_the_marks() -> None:
    before = model()
    marked(KINDS, before, 4)
    after = marked(Recipe("other", (Rule(("embed",), bits=4), Rule(("a",)), Rule(bits=8))), before, 4)
    bits = [
        rule.bits if (rule := rule_of(lazy(after, name))) else None
        for name in ("embed.weight", "a.weight.T", "b.weight.T")
    ]
    assert bits == [4, None, 8]


def test_a_layer_without_a_rule_and_one_left_in_float_have_none() -> None:
    after = marked(Recipe("mine", (Rule(("a",)), Rule(("head",), bits=8))), model(), 4)
    assert [rule_of(lazy(after, name)) for name in ("a.weight.T", "b.weight.T")] == [None, None]
    assert layers_of(lazy(after, "b.weight.T")) == ("b",), "packing compares the rules of all layers"
    assert rule_of(lazy(after, "head.weight.T")) is not None


def test_a_tied_head_has_the_rule_of_its_table() -> None:
    tied = TEXT.replace("head.weight.T", "embed.weight.T")
    before = build(
        tied,
        **{n: WEIGHTS[n] for n in ("embed__weight", "norm__weight", "a__weight__T", "b__weight__T")},
        embed__weight__T=WEIGHTS["embed__weight"].T.copy(),
    )
    after = marked(KINDS, before, 4)
    assert rule_of(lazy(after, "embed.weight.T")) is KINDS.rules[0]
    assert rule_of(lazy(after, "embed.weight")) is KINDS.rules[0]


def test_the_head_is_found_through_what_comes_after_it() -> None:
    capped = TEXT.replace(
        'logits = MatMul(r, "head.weight.T")', 'h = MatMul(r, "head.weight.T") t = Tanh(h) logits = Neg(t)'
    )
    assert rule_of(lazy(marked(KINDS, model(capped), 4), "head.weight.T")) is KINDS.rules[1]


def test_experts_are_a_kind_of_their_own() -> None:
    text = """(float[n,4] x, int64[n,2] index, float[n,2] shares) => (float[n,9] logits) {
        e = satchel.Experts(x, index, shares, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
        logits = MatMul(e, "head.weight.T")
    }"""
    weights = {"mlp__experts__gate_up_proj": normal(6, 3, 8, 4), "mlp__experts__down_proj": normal(7, 3, 4, 4)}
    before = build(text, **weights, head__weight__T=WEIGHTS["head__weight__T"])
    recipe = Recipe("mine", (Rule(("*.down_proj",), ("experts",), bits=8), Rule(kinds=("experts",), bits=4)))
    after = marked(recipe, before, 3)
    assert rule_of(lazy(after, "mlp.experts.down_proj")) is recipe.rules[0]
    assert rule_of(lazy(after, "mlp.experts.gate_up_proj")) is recipe.rules[1]
    assert rule_of(lazy(after, "head.weight.T")) is None


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.0.mlp.up_proj.weight.T", "model.layers.0.mlp.up_proj"), ("lm_head.weight", "lm_head"),
     ("mlp.experts.down_proj", "mlp.experts.down_proj"), ("q_proj.weight.interleaved.T", "q_proj")],
)  # fmt: skip
def test_a_layer_is_called_as_in_the_checkpoint(name: str, layer: str) -> None:
    array = normal(1, 2, 2)
    assert layer_name(LazyWeight(name, array.shape, ir.DataType.FLOAT, lambda a, b: array[a:b])) == layer

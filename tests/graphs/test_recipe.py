"""Recipes: the first rule that matches counts, and what cannot be is an error that names the place."""

from __future__ import annotations

import pytest

from satchel.graphs.quant.recipe import Recipe, RecipeError, Rule, Scheme, parse_recipe, write_recipe

GOOD = """
transforms = ["rotate", "hadamard"]
hadamard_block = 32

[[rule]]
layers = ["*.down_proj", "model.layers.0.*"]
kinds = "linear"
bits = 8
blocks = [64, 32]
rounding = "gptq"

[[rule]]
layers = "lm_head"
optional = true

[[rule]]
kinds = ["linear"]
bits = 8
blocks = "channel"
rounding = "nearest"
prefill = "token"
decode = "tensor"

[[rule]]
kinds = ["embedding", "head", "experts"]
bits = 4
symmetric = false
"""
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def test_a_recipe_is_read_as_it_is_written() -> None:
    assert parse_recipe(GOOD, "mine") == Recipe(
        name="mine",
        rules=(
            Rule(("*.down_proj", "model.layers.0.*"), ("linear",), 8, (64, 32), rounding="gptq"),
            Rule(("lm_head",), optional=True),
            Rule(("*",), ("linear",), 8, ("channel",), rounding="nearest", prefill="token", decode="tensor"),
            Rule(("*",), ("embedding", "head", "experts"), 4, (32,), symmetric=False),
        ),
        transforms=("rotate", "hadamard"),
        hadamard_block=32,
    )


@pytest.mark.parametrize(
    ("layer", "kind", "index"),
    [
        ("model.layers.0.self_attn.q_proj", "linear", 0),
        ("model.layers.7.mlp.down_proj", "linear", 0),
        ("model.layers.7.mlp.down_proj", "experts", 3),
        ("lm_head", "head", 1),
        ("model.layers.7.mlp.up_proj", "linear", 2),
        ("model.embed_tokens", "embedding", 3),
    ],
)
def test_the_first_rule_that_matches_counts(layer: str, kind: str, index: int) -> None:
    recipe = parse_recipe(GOOD, "mine")
    assert recipe.rule(layer, kind) is recipe.rules[index]


def test_no_rule_means_float() -> None:
    recipe = parse_recipe('[[rule]]\nlayers = "a.*"\nbits = 8', "mine")
    assert recipe.rule("b.c", "linear") is None
    assert recipe.rule("a.c", "linear") is recipe.rules[0]
    assert recipe.rule("A.c", "linear") is None, "names are compared as they are written"


@pytest.mark.parametrize(("inputs", "block"), [(128, 64), (96, 32), (32, 32), (7 * 64, 64)])
def test_the_first_block_that_divides_the_inputs_is_taken(inputs: int, block: int) -> None:
    assert Rule(bits=4, blocks=(64, 32), symmetric=False).scheme(inputs) == Scheme(4, block, symmetric=False)


def test_a_scale_per_channel_suits_all_inputs() -> None:
    assert Rule(bits=8, blocks=(64, "channel")).scheme(37) == Scheme(8, None)
    assert Rule(bits=8, blocks=(64, "channel")).scheme(128) == Scheme(8, 64)


def test_inputs_that_no_block_divides_are_an_error() -> None:
    with pytest.raises(RecipeError, match=r"^48 inputs .* 64, 32"):
        Rule(bits=4, blocks=(64, 32)).scheme(48)


@pytest.mark.parametrize(
    ("scheme", "kind", "bits"),
    [
        (Scheme(8, 32), "linear", 8.5),
        (Scheme(8, 64), "head", 8.25),
        (Scheme(8, 64), "embedding", 8.5),
        (Scheme(4, 32), "linear", 4.5),
        (Scheme(4, 32, symmetric=False), "linear", 4.625),
        (Scheme(8, 16, symmetric=False), "experts", 10.5),
        (Scheme(8, None), "linear", 8.0),
    ],
)
def test_bits_per_weight_count_scales_and_zero_points(scheme: Scheme, kind: str, bits: float) -> None:
    assert scheme.bits_per_weight(kind) == bits


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ('[[rule]]\nbits = 4\nrounding = "gptq"', True),
        ('[[rule]]\nrounding = "gptq"', False),
        ("[[rule]]\nbits = 4", False),
        ('transforms = "smooth"\n[[rule]]\nbits = 8', True),
        ('transforms = ["rotate", "hadamard"]\n[[rule]]\nbits = 8', False),
    ],
    ids=["gptq", "gptq in float", "search", "smooth", "rotate"],
)
def test_a_text_is_needed_for_gptq_and_smoothing(text: str, needed: bool) -> None:
    assert parse_recipe(text, "mine").needs_calibration() is needed


def test_a_pattern_that_matches_no_layer_is_an_error() -> None:
    recipe = parse_recipe('[[rule]]\nbits = 8\n[[rule]]\nlayers = ["*.down_proj", "*.c_fc"]\nbits = 4', "mine")
    with pytest.raises(RecipeError, match=r"^rule 2: .*\*\.c_fc.* model\."):
        recipe.check_layers(LAYERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule = [", "not valid TOML"),
        ("[rule]\nbits = 8", "no [[rule]]"),
        ("rule = [8]", "rule 1 is not a table"),
        ("speed = 3\n[[rule]]", "the recipe: speed is not known: choose from transforms, hadamard_block"),
        ('transforms = "spin"\n[[rule]]', "transforms spin: choose rotate, smooth, hadamard"),
        ("transforms = []\n[[rule]]", "the recipe: transforms is (): give tuple[str]"),
        ("hadamard_block = 24\n[[rule]]", "hadamard_block 24 is not a power of two"),
        ("hadamard_block = 0\n[[rule]]", "hadamard_block 0 is not a power of two"),
        ("hadamard_block = true\n[[rule]]", "the recipe: hadamard_block is True: give int"),
        ("[[rule]]\n[[rule]]\nbit = 8", "rule 2: bit is not known: choose from layers, kinds, bits"),
        ("[[rule]]\nbits = 5", "rule 1: bits 5: choose 4, 8"),
        ("[[rule]]\nbits = 8.0", "rule 1: bits is 8.0: give int"),
        ('[[rule]]\nbits = "8"', "rule 1: bits is '8': give int"),
        ("[[rule]]\nblocks = [32, 48]", "rule 1: blocks 48: choose 16, 32, 64, 128, channel"),
        ('[[rule]]\nblocks = "row"', "rule 1: blocks row: choose"),
        ("[[rule]]\nblocks = []", "rule 1: blocks is ()"),
        ("[[rule]]\nblocks = 32.0", "rule 1: blocks is (32.0,): give tuple[int | str]"),
        ("[[rule]]\nlayers = [3]", "rule 1: layers is (3,): give tuple[str]"),
        ('[[rule]]\nkinds = ["linear", "conv"]', "rule 1: kinds conv: choose linear, embedding, head, experts"),
        ("[[rule]]\nsymmetric = 1", "rule 1: symmetric is 1: give bool"),
        ('[[rule]]\nrounding = "up"', "rule 1: rounding up: choose nearest, search, gptq"),
        ('[[rule]]\nprefill = "tensor"', "rule 1: prefill tensor: choose float, token"),
        ('[[rule]]\ndecode = "row"', "rule 1: decode row: choose float, token, tensor"),
    ],
)
def test_what_cannot_be_is_an_error(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "mine")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


INT8 = 'kinds = "linear"\nbits = 8\nblocks = "channel"\nprefill = "token"\ndecode = "token"'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bits = 8", "bits = 4", "int8 activations go with bits = 8"),
        ('"channel"', "32", "int8 activations go with bits = 8"),
        ('"channel"', '[64, "channel"]', "int8 activations go with bits = 8"),
        ("bits = 8", "bits = 8\nsymmetric = false", "int8 activations go with bits = 8"),
        ('decode = "token"', 'decode = "float"', "no kernel with float activations"),
        ('prefill = "token"', "", "no kernel with float activations"),
        ('kinds = "linear"', 'kinds = ["linear", "embedding"]', "int8 activations are for"),
        ('kinds = "linear"', "", "int8 activations are for"),
    ],
)
def test_int8_activations_go_with_weights_that_have_a_kernel(old: str, new: str, message: str) -> None:
    assert parse_recipe(f"[[rule]]\n{INT8}", "mine").rules[0].prefill == "token"
    assert old in INT8
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"[[rule]]\n{INT8.replace(old, new)}", "mine")


NAMES = tuple(f'model.layers.{i}.mlp."down"' for i in range(6))


@pytest.mark.parametrize(
    "recipe",
    [
        parse_recipe(GOOD, "mine"),
        parse_recipe("[[rule]]", "mine"),
        Recipe("mine", (Rule(NAMES, ("linear",), 8, (64, "channel"), symmetric=False), Rule(bits=4))),
        Recipe("mine", (Rule(("\\*", "[!a]*"), optional=True),), ("smooth",), 4),
    ],
    ids=["all fields", "defaults", "many names", "escapes"],
)
def test_a_recipe_that_is_written_is_read_again(recipe: Recipe) -> None:
    assert parse_recipe(write_recipe(recipe, "Two lines\nof comment."), "mine") == recipe

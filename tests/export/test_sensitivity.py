"""`satchel sensitivity`: it finds the layer that loses most, and writes a recipe within the budget."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import CONTEXT, add_tokenizer, tiny_model
from support.command import Satchel
from support.export_command import tree

from satchel.export import ExportConfig, export_bundle
from satchel.export.find_sensitive import Search, find_sensitive
from satchel.export.quantize.sensitivity import Sensitivity, raise_most_sensitive, raised_recipe
from satchel.export.recipes import load_recipe
from satchel.export.writing.report import report
from satchel.graphs.quant.recipe import Recipe, Rule, parse_recipe
from satchel.runtime.cli import main as cli

WIDE: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 256,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}
HEAD_DIM = 160 // 5
SENSITIVE = "model.layers.1.mlp.down_proj"
RECIPE = """[[rule]]
kinds = ["embedding", "head"]
bits = 8
[[rule]]
layers = ["*.down_proj"]
bits = 4
blocks = [128]
[[rule]]
bits = 4
rounding = "gptq"
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which one product has outliers: few bits are too coarse for the rest of their blocks."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    model = tiny_model("llama", **WIDE)
    with torch.no_grad():
        weight = model.get_submodule(SENSITIVE).weight
        weight[:, ::128] = 3 * torch.randn(len(weight), 2).sign()
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(wide: Path) -> Path:
    path = wide.parent / "mine.toml"
    path.write_text(RECIPE)
    return path


@dataclasses.dataclass(frozen=True)
class Written:
    """What the command printed, and the recipe that it wrote."""

    document: dict[str, Any]
    path: Path

    @property
    def layers(self) -> list[dict[str, Any]]:
        return self.document["layers"]

    @property
    def raised(self) -> set[str]:
        return {name for layer in self.layers if layer["raised"] for name in layer["layers"]}


@pytest.fixture(scope="module")
def found(wide: Path, recipe: Path) -> Written:
    path = wide.parent / "found" / "mixed.toml"
    path.parent.mkdir()
    arguments = [wide, "--recipe", recipe, "--windows", "1", "--bits", "7", "-o", path, "--json", "--quiet"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["sensitivity", *map(str, arguments)]) == 0
    assert out.getvalue().count("\n") == 1
    assert [file.name for file in path.parent.iterdir()] == ["mixed.toml"]
    return Written(json.loads(out.getvalue()), path)


def test_every_product_is_tried_and_the_sensitive_one_loses_most(found: Written) -> None:
    assert [len(layer["layers"]) for layer in found.layers] == [3, 1, 2, 1] * 2
    assert found.layers[0]["layers"] == [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    assert (found.layers[3]["weights"], found.layers[3]["inputs"]) == (160 * 256, 256)
    assert all(layer["kl"] > 0 for layer in found.layers)
    second, worst = sorted(found.layers, key=lambda layer: layer["kl"])[-2:]
    assert worst["layers"] == [SENSITIVE]
    assert worst["kl"] > 1.5 * second["kl"]
    assert worst["kl"] > 20 * found.layers[3]["kl"], "the same product without outliers"


def test_the_recipe_that_is_written_raises_what_was_chosen(found: Written) -> None:
    text = found.path.read_text()
    written = parse_recipe(text, "written")
    assert SENSITIVE in found.raised
    assert not all(layer["raised"] for layer in found.layers)
    for layer in found.layers:
        for name in layer["layers"]:
            rule = written.rule(name, "linear")
            assert rule is not None
            assert rule.bits == (8 if name in found.raised else 4)
    assert text.startswith("# As mine, ")


@pytest.mark.slow
def test_the_exported_recipe_is_within_the_budget_and_closer_to_the_model(
    found: Written, wide: Path, recipe: Path, tmp_path: Path
) -> None:
    facts = [
        report(export_bundle(wide, ExportConfig(tmp_path / path.stem, "int4", recipe=path)))
        for path in (recipe, found.path)
    ]
    bits = found.document["bits_per_weight"]
    in_float = 32 * (2 * CONTEXT * HEAD_DIM // 2 + 5 * 160)  # rotary tables and norms
    assert facts[1]["bits_per_weight"] == pytest.approx(bits + in_float / facts[1]["parameters"], abs=0.02)
    assert 6.5 < bits <= 7
    assert facts[1]["kl"] < 0.6 * facts[0]["kl"]


def test_without_a_budget_it_only_measures(wide: Path, recipe: Path) -> None:
    result = find_sensitive(wide, Search("int4", str(recipe), windows=1))
    assert (len(result.layers), result.raised) == (8, [])
    assert parse_recipe(result.recipe, "mine") == load_recipe(recipe)


def test_too_few_bits_are_an_error(satchel: Satchel, wide: Path, recipe: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    flags = ("--recipe", recipe, "--windows", 1, "--bits", 4.2, "-o", tmp_path / "mixed.toml", "--quiet")
    assert satchel.refuses("sensitivity", wide, *flags).startswith("--bits 4.2: ")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "6"), "--bits and --output"),
        (("-o", "absent.toml"), "--bits and --output"),
        (("--precision", "fp32"), "--precision fp32 "),
        (("--precision", "int3"), "--precision int3"),
        (("--windows", "0"), "--windows 0: "),
        (("--recipe", "nowhere"), "--recipe nowhere: cannot be read"),
        (("--text", "nowhere.txt"), "nowhere.txt: cannot be read"),
        (("--precision", "int8"), "recipe int8: "),
    ],
)
def test_a_wrong_option_is_one_line(satchel: Satchel, arguments: tuple[str, ...], message: str, wide: Path) -> None:
    assert message in satchel.refuses("sensitivity", wide, *arguments, "--quiet")


def test_a_recipe_that_is_there_is_kept(satchel: Satchel, wide: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed.toml").write_text("mine")
    said = satchel.refuses("sensitivity", wide, "--bits", 7, "-o", tmp_path / "mixed.toml", "--quiet")
    assert "mixed.toml already exists" in said
    assert "--force" in said
    assert (tmp_path / "mixed.toml").read_text() == "mine"


BASE = Recipe(
    "base",
    (
        Rule(("*.down",), ("linear",), 4, (128,)),
        Rule(("*.gate",), ("linear",), 4, (32,), symmetric=False),
        Rule(("float",),),
        Rule(bits=4, blocks=(64,)),
    ),
)  # fmt: skip
DOWN = Sensitivity(("a.down",), 1280, 128, 0.5)
GATE = Sensitivity(("a.gate", "a.up.gate"), 640, 64, 0.2)
OTHER = Sensitivity(("a.o",), 640, 64, 0.01)


@pytest.mark.parametrize(
    ("spare", "raised"),
    [
        (0, []),
        (640 * 4 + 1, [OTHER]),
        (640 * 4.125 + 1, [GATE]),
        (1280 * 4 + 1, [DOWN]),
        (1280 * 4 + 640 * 4.125 - 1, [DOWN, OTHER]),
        (1280 * 4 + 640 * 4.125 + 1, [DOWN, GATE]),
        (1e9, [DOWN, GATE, OTHER]),
    ],
)
def test_those_that_lose_most_for_their_size_come_first(spare: float, raised: list[Sensitivity]) -> None:
    assert raise_most_sensitive(BASE, [OTHER, GATE, DOWN], 5.0, 5.0 + spare / 10000, 10000) == raised


def test_raised_layers_keep_the_blocks_of_their_rules() -> None:
    recipe = raised_recipe(BASE, [GATE, DOWN, OTHER])
    for layer in (DOWN, GATE, OTHER):
        for name in layer.layers:
            old, new = BASE.rule(name, "linear"), recipe.rule(name, "linear")
            assert old is not None
            assert new is not None
            assert (new.bits, new.blocks, new.symmetric) == (8, old.blocks, old.symmetric)
    assert recipe.rule("b.o", "linear") is BASE.rules[-1]
    assert recipe.rule("a.down", "experts") is BASE.rules[-1], "only products are raised"

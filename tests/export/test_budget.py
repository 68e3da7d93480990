"""--bits and --size: what each weight costs is measured, and the mixture that is exported keeps to the budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.checkpoints import VOCABULARY, add_tokenizer, tiny_model
from support.command import Satchel
from support.export_command import tree

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.export.compile import lower, open_source, trace_source
from satchel.export.quantize.budget import NAME, RECIPE_NAME, Budget, _aligned, find_recipe
from satchel.export.quantize.quantize import transform
from satchel.export.quantize.sensitivity import Sensitivity, count, measure, schemes_of
from satchel.export.recipes import load_recipe
from satchel.export.writing.report import report
from satchel.graphs.ir.weights import aligned
from satchel.graphs.quant.recipe import Scheme, parse_recipe
from satchel.runtime.bundle.contract import WEIGHTS_NAME
from satchel.runtime.bundle.manifest import Manifest

WIDE: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 256,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}
SENSITIVE = "model.layers.1.mlp.down_proj"
BITS = 6.5
SMALL_BITS = 5.9


def _smallest(checkpoint: Path) -> tuple[float, int]:
    """The fewest bits per weight of a checkpoint of `WIDE`, without the 32 bits of norms, and its parameters."""
    with safe_open(checkpoint / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    each = {160: 4.5, 256: 4.125}  # groups of 32 and 128
    bits = sum(math.prod(s) * (each[s[-1]] if len(s) > 1 else 4.0) for s in shapes.values())
    bits += math.prod(shapes["model.embed_tokens.weight"]) * 0.5  # its scales are float32
    parameters = sum(map(math.prod, shapes.values()))
    return bits / parameters, parameters


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which one product has outliers: few bits are too coarse for the rest of their blocks."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    model = tiny_model("llama", **WIDE)
    with torch.no_grad():
        weight = model.get_submodule(SENSITIVE).weight
        weight[:, ::32] = 3 * torch.randn(len(weight), 8).sign()
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose head is its embedding."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tied"
    tiny_model("llama", **WIDE, tie_word_embeddings=True).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def exported(wide: Path) -> Manifest:
    return export_bundle(wide, ExportConfig(wide.parent / "mixed", bits=BITS))


@pytest.fixture(scope="module")
def measured(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Sensitivity]:
    config, recipe, done = ExportConfig(Path("unused"), bits=BITS), load_recipe("int4"), list[int]()
    checkpoint = open_source(wide, config)
    common, _ = lower(trace_source(checkpoint, config), checkpoint, config, recipe)
    rotated, _ = transform(common, recipe)
    windows = np.random.default_rng(4).integers(3, VOCABULARY, (4, 40))
    found = measure(rotated, windows, tmp_path_factory.mktemp("measured"), done.append)
    assert len(done) == count(common) == 2 * len(found)
    return found


@pytest.mark.slow
def test_every_weight_is_tried_and_the_sensitive_one_loses_most(measured: list[Sensitivity]) -> None:
    kinds = ["embedding", *["linear"] * 8, "head"]
    assert [layer.kind for layer in measured] == kinds
    assert [len(layer.layers) for layer in measured] == [1, *[3, 1, 2, 1] * 2, 1]
    assert measured[1].layers == tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
    assert (measured[4].weights, measured[4].inputs) == (160 * 256, 256)
    assert all(layer.kl > 0 for layer in measured)
    worst = max(measured[1:-1], key=lambda layer: layer.kl)
    assert worst.layers == (SENSITIVE,)
    assert worst.kl > 20 * measured[4].kl, "the same product without outliers"


def test_finer_schemes_are_foreseen_to_lose_less(measured: list[Sensitivity]) -> None:
    for layer in measured:
        assert list(layer.errors) == schemes_of(layer.inputs, layer.kind)
        assert layer.errors[Scheme(4, 32)] < 1.01
        assert layer.errors[Scheme(8, 32)] < layer.errors[Scheme(4, 32)] / 50
        if layer.kind == "linear":
            assert layer.errors[Scheme(4, 32, symmetric=False)] < layer.errors[Scheme(4, 32)]


@pytest.mark.slow
def test_the_bundle_keeps_to_its_bits(exported: Manifest, wide: Path) -> None:
    facts = report(exported)
    assert BITS * 0.99 < facts["bits_per_weight"] <= BITS
    kept = parse_recipe((wide.parent / "mixed" / RECIPE_NAME).read_text(), "kept")
    assert RECIPE_NAME in exported.files
    assert {rule.bits for rule in kept.rules[:3]} == {4, 8}


@pytest.mark.slow
def test_it_is_closer_to_the_model_than_uniform_bits(exported: Manifest, wide: Path, tmp_path: Path) -> None:
    uniform = report(export_bundle(wide, ExportConfig(tmp_path / "int4", "int4")))
    mixed = report(exported)
    assert mixed["kl"] < 0.6 * uniform["kl"]


@pytest.mark.slow
def test_the_recipe_in_the_bundle_gives_the_same_weights(exported: Manifest, wide: Path, tmp_path: Path) -> None:
    kept = wide.parent / "mixed" / RECIPE_NAME
    again = export_bundle(wide, ExportConfig(tmp_path / "again", "int4", recipe=kept))
    assert again.files[WEIGHTS_NAME] == exported.files[WEIGHTS_NAME]


@pytest.mark.slow
def test_a_size_counts_the_weight_file_and_a_tied_head_once(tied: Path, tmp_path: Path) -> None:
    megabytes = SMALL_BITS * _smallest(tied)[1] / 8e6
    config = ExportConfig(tmp_path / "bundle", size=megabytes, certificate=False)
    size = export_bundle(tied, config).files[WEIGHTS_NAME].bytes
    kept = parse_recipe((tmp_path / "bundle" / RECIPE_NAME).read_text(), "kept")
    assert next(rule.bits for rule in kept.rules if rule.kinds == ("embedding",)) == 4
    assert megabytes * 0.985e6 < size <= megabytes * 1e6


def test_what_is_counted_is_no_less_than_what_a_weight_file_takes() -> None:
    sizes = [70, 1 << 20, 4096, 3 << 20, 1 << 20, 64, 1000, (1 << 20) + 8]
    end = 0
    for size in sizes:  # as files are written
        end = aligned(end, size) + size
    assert end <= sum(map(_aligned, sizes)) < end + 4096 * len(sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "3"), "--bits 3: "),
        (("--bits", "20"), "--bits 20: "),
        (("--bits", "nan"), "--bits nan: "),
        (("--bits", "-5"), "--bits -5: "),
        (("--size", "0.1"), "--size 0.1: "),
        (("--size", "9"), "--size 9: "),
        (("--bits", "5", "--precision", "fp32"), "--precision fp32"),
        (("--bits", "5", "--precision", "int8"), "--precision int8"),
        (("--bits", "5", "--recipe", "int4-mixed"), "--recipe int4-mixed"),
        (("--bits", "5", "--effort", "quick"), "--effort quick"),
        (("--bits", "5", "--target", "cann"), "--precision int4"),
        (("--bits", "5", "--calibrate", "SHORT"), "tokens, but needs at least"),
        (("--recipe", "BITS"), "bits 5: choose 4, 8"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(
    satchel: Satchel, arguments: tuple[str, ...], message: str, wide: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "short.txt").write_text("the cat sat on the mat. " * 3)
    (tmp_path / "bits.toml").write_text("[[rule]]\nbits = 5\n")
    files = {"SHORT": tmp_path / "short.txt", "BITS": tmp_path / "bits.toml"}
    before = tree(tmp_path)
    monkeypatch.setattr("satchel.export.compile.trace_source", lambda *_: pytest.fail("it was traced"))
    words = [files.get(word, word) for word in arguments]
    assert message in satchel.refuses("export", wide, "-o", tmp_path / "out", *words, "--quiet")
    assert tree(tmp_path) == before


def test_the_message_says_what_is_possible(satchel: Satchel, wide: Path, tmp_path: Path) -> None:
    said = satchel.refuses("export", wide, "-o", tmp_path / "out", "--bits", "3", "--quiet")
    numbers = [float(word) for word in said.split() if word.replace(".", "").isdigit()]
    assert 4 < numbers[-2] < 6 < 8.5 < numbers[-1] < 12


def test_the_range_counts_a_tied_head_once(satchel: Satchel, tied: Path, tmp_path: Path) -> None:
    smallest, _ = _smallest(tied)
    said = satchel.refuses("export", tied, "-o", tmp_path / "out", "--bits", "3", "--quiet")
    numbers = [float(word) for word in said.split() if word.replace(".", "").isdigit()]
    assert smallest <= numbers[-2] < smallest + 0.011


def test_a_budget_is_checked_against_what_mixtures_take() -> None:
    budget = Budget(500.0, "--bits 5", 100, "bits per weight")
    budget.check(400, 500)
    for smallest, largest in ((501, 900), (100, 499)):
        with pytest.raises(ExportError, match="--bits 5: "):
            budget.check(smallest, largest)


def test_a_resumed_export_takes_the_recipe_that_was_found(tmp_path: Path) -> None:
    base, budget = load_recipe("int4"), Budget(1.0, "--bits 1", 1, "bits per weight")
    (tmp_path / RECIPE_NAME).write_text("[[rule]]\nbits = 8\n")
    none: Any = None  # nothing is measured again
    found, text = find_recipe(none, base, budget, none, tmp_path, none, "model")
    assert (found.name, [rule.bits for rule in found.rules]) == (NAME, [8])
    assert text == "[[rule]]\nbits = 8\n"

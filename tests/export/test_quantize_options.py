"""The options of quantizing: what cannot be is one line with exit code 2, before the model is traced."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_tiny
from support.command import Said
from support.tiny_bundle import read_manifest

from satchel.export import ExportConfig, ExportError
from satchel.export.compile import open_source
from satchel.export.recipes import load_recipe, shipped
from satchel.export.recipes.fit import fit_recipe

Options = Callable[[Path], tuple[str | Path, ...]]


@pytest.fixture
def _not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before the long part of the work."""
    monkeypatch.setattr("satchel.export.compile.trace_source", lambda *_: pytest.fail("the model was traced"))


def recipe(text: str) -> Options:
    """The options for a recipe of one's own with int4."""

    def options(folder: Path) -> tuple[str | Path, ...]:
        (folder / "mine.toml").write_text(text)
        return ("--precision", "int4", "--recipe", folder / "mine.toml")

    return options


def calibration(content: bytes, *more: str) -> Options:
    """The options for a calibration text of one's own with int4."""

    def options(folder: Path) -> tuple[str | Path, ...]:
        (folder / "text.txt").write_bytes(content)
        return ("--precision", "int4", "--calibrate", folder / "text.txt", *more)

    return options


def plain(*options: str) -> Options:
    return lambda folder: options


LINEAR = '[[rule]]\nkinds = ["linear"]\nbits = 4\n'
CASES: dict[str, tuple[Options, tuple[str, ...]]] = {
    "unknown cache": (plain("--kv-cache", "int4"), ("--kv-cache int4", "float or int8")),
    "a recipe with fp32": (plain("--precision", "fp32", "--recipe", "int4"), ("--recipe", "--precision fp32")),
    "a recipe without a precision": (plain("--recipe", "int4"), ("--recipe int4", "--precision fp32")),
    "an absent recipe": (
        plain("--precision", "int4", "--recipe", "nowhere.toml"),
        ("--recipe nowhere.toml: cannot be read", "a16w4, a16w8, a16w8-channel, a8w8, int4"),
    ),
    "three bits": (recipe("[[rule]]\nbits = 3"), ("mine.toml: rule 1: bits 3: choose 4, 8",)),
    "an unknown layer": (
        recipe(f'[[rule]]\nlayers = ["*.c_fc"]\nbits = 8\n{LINEAR}'),
        ("recipe mine: rule 1: no layer of the model is called *.c_fc", "the layers are lm_head, model."),
    ),
    "a block that does not divide a layer's inputs": (
        recipe(f"{LINEAR}blocks = [64]"),
        ("recipe mine: model.layers.0.mlp.down_proj: 96 inputs cannot be cut into blocks of 64", "choose a block"),
    ),
    "an absent calibration text": (
        plain("--precision", "int4", "--calibrate", "nowhere.txt"),
        ("--calibrate nowhere.txt: cannot be read (No such file",),
    ),
    "an empty calibration text": (calibration(b" \n"), ("text.txt: is empty",)),
    "a tiny calibration text": (calibration(b"a few words, and no more"), ("--calibrate", "text.txt: has ", "1024")),
    "a calibration text that is not UTF-8": (calibration(b"caf\xe9" * 2000), ("text.txt: not UTF-8 at byte 3",)),
    "calibrating floats": (calibration(b"words " * 5000, "--precision", "fp32"), ("--calibrate", "--precision fp32")),
    "calibrating without calibration": (
        calibration(b"words " * 5000, "--precision", "int4", "--effort", "quick"),
        ("--calibrate", "--effort quick"),
    ),
    "an effort without rounding": (plain("--effort", "quick"), ("--effort quick", "--precision fp32")),
    "a text for no certificate": (
        plain("--no-certificate", "--eval-text", "text.txt"),
        ("--eval-text", "--no-certificate"),
    ),
    "an absent text for the certificate": (
        plain("--eval-text", "nowhere.txt"),
        ("--eval-text nowhere.txt: cannot be read",),
    ),
    "too short a text for the certificate": (lambda folder: ("--eval-text", short(folder)), ("--eval-text", "128")),
}


def short(folder: Path) -> Path:
    path = folder / "short.txt"
    path.write_text("a few words")
    return path


@pytest.mark.usefixtures("_not_traced")
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_option_is_one_line(
    refused: Callable[..., None], case: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options, says = CASES[case]
    refused(tiny_checkpoint, *options(tmp_path), says=says)


@pytest.mark.usefixtures("_not_traced")
@pytest.mark.parametrize("option", ["--calibrate", "--eval-text"])
def test_a_text_needs_a_tokenizer(refused: Callable[..., None], option: str, tmp_path: Path) -> None:
    source, text = save_tiny(tmp_path / "mute"), tmp_path / "text.txt"
    text.write_text("words " * 5000)
    refused(source, "--precision", "int4", option, text, says=(option, "mute has no tokenizer", "--tokenizer"))


@pytest.mark.parametrize(
    ("options", "effort"),
    [
        ({}, "quick"),
        ({"precision": "a16w8"}, "quick"),
        ({"precision": "int4"}, "normal"),
        ({"precision": "int4", "effort": "quick"}, "quick"),
        ({"precision": "int8", "recipe": "a8w8"}, "normal"),
        ({"precision": "int8", "calibrate": Path("text.txt")}, "normal"),
        ({"precision": "int8", "kv_cache": "int8"}, "quick"),
        ({"precision": "fp32"}, None),
    ],
)
def test_the_default_effort_calibrates_only_where_it_pays_or_is_asked_for(
    options: dict[str, Any], effort: str | None, tmp_path: Path
) -> None:
    config = ExportConfig(tmp_path, **options)
    assert config.effort == effort
    assert dataclasses.replace(config, force=True).effort == effort


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_recipes_that_ship_suit_every_family(name: str, family: str, tmp_path: Path) -> None:
    fit_recipe(
        load_recipe(name), open_source(save_tiny(tmp_path / family, family), ExportConfig(tmp_path, precision="fp32"))
    )


def test_a_file_comes_before_a_recipe_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("int4").write_text("[[rule]]\nbits = 8")
    assert load_recipe("int4").rules[0].bits == 8


def test_a_recipe_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(ExportError, match=r"mine\.toml: not UTF-8 at byte 5"):
        load_recipe(tmp_path / "mine.toml")


@pytest.mark.slow
def test_a_recipe_by_its_name_is_taken(export: Callable[..., Said], tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--precision", "int4", "--recipe", "a16w8", "--no-certificate", "--json", "--quiet")
    facts = json.loads(export(tiny_checkpoint, "-o", tmp_path / "bundle", *arguments).out)
    assert (facts["precision"], facts["kl"]) == ("int4", None)
    assert 8 < facts["bits_per_weight"] < 9.5
    assert read_manifest(tmp_path / "bundle")["precision"] == "int4"

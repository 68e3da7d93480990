"""Passes and operators of a user's own in an export: what they do, and what is said of bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.command import Said, Satchel
from support.custom_ops import DOMAIN, LIBRARY, halve_logits, split_signs
from support.genai import by_genai, by_satchel

from satchel.export import ExportConfig, export_bundle
from satchel.export.user_passes import open_passes
from satchel.runtime import Custom, Engine, open_bundle
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.errors import SatchelWarning

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
HEAD = """\
from satchel.graphs.ir.contract import PassResult, graph_pass
from satchel.graphs.ir.values import Builder, nodes, replace
"""


@pytest.fixture(scope="module")
def custom(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a pass that halves logits, and one that puts a library's operator into each graph."""
    folder = tmp_path_factory.mktemp("custom") / "bundle"
    config = ExportConfig(
        folder, precision="fp32", certificate=False, passes=(halve_logits, split_signs), custom_ops=(LIBRARY,)
    )
    export_bundle(tiny_checkpoint, config)
    return folder


def score(folder: Path, custom: Custom) -> np.ndarray:
    return Engine.open(open_bundle(folder, custom=custom), threads=1).score(IDS)


def test_passes_run_and_can_be_switched_off(custom: Path, tiny_bundle: Path) -> None:
    plain = score(custom, Custom(passes=False))
    np.testing.assert_array_equal(plain, score(tiny_bundle, Custom()))
    np.testing.assert_allclose(score(custom, Custom((LIBRARY,))), plain / 2, rtol=1e-6)
    np.testing.assert_array_equal(score(custom, Custom(operators=False)), plain)


def test_without_a_library_the_plain_graphs_run_and_one_line_says_so(custom: Path) -> None:
    with pytest.warns(SatchelWarning, match=rf"the plain graphs run.*{LIBRARY.name}.*--custom-ops") as warned:
        found = Engine.open(open_bundle(custom), threads=1).score(IDS)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    np.testing.assert_array_equal(found, score(custom, Custom(passes=False)))


def test_the_manifest_tells_all_of_it(custom: Path, tiny_bundle: Path) -> None:
    manifest = Manifest.read(custom / "manifest.json")
    names = ["support.custom_ops:halve_logits", "support.custom_ops:split_signs"]
    for phase in ("prefill", "decode", "score"):
        done = {entry["pass"]: entry["count"] for entry in manifest.passes if entry["graph"] == phase}
        assert [done[name] for name in names] == [1, 1]
    assert manifest.provenance is not None
    assert [entry["name"] for entry in manifest.provenance.options["passes"]] == names
    assert all(len(entry["sha256"]) == 64 for entry in manifest.provenance.options["passes"])
    assert [file.name for file in manifest.custom_ops] == [LIBRARY.name]
    assert manifest.plain is not None
    assert manifest.plain.graphs is not None
    assert manifest.plain.graphs.prefill.file == "plain_prefill.onnx"
    plain = Manifest.read(tiny_bundle / "manifest.json")
    assert (plain.plain, plain.custom_ops) == (None, ())
    assert manifest.files["weights.bin"].bytes < plain.files["weights.bin"].bytes + 4096  # both read the same weights
    for phase in ("prefill", "decode", "score"):
        assert (custom / f"plain_{phase}.onnx").read_bytes() == (tiny_bundle / f"{phase}.onnx").read_bytes()
        assert DOMAIN in {
            node.domain for node in onnx.load(custom / f"{phase}.onnx", load_external_data=False).graph.node
        }


def test_another_runner_gets_graphs_that_need_no_library(
    custom: Path, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    decoder = json.loads((custom / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["filename"] == "plain_prefill.onnx"
    plain = Engine.open(open_bundle(tiny_bundle), threads=1)
    (tokens, logits), (wanted, expected) = by_genai(custom, [IDS], 8, tmp_path)[0], by_satchel(plain, [IDS], 8)[0]
    assert tokens == wanted
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    config = ExportConfig(tmp_path / "halved", precision="fp32", certificate=False, passes=(halve_logits,))
    export_bundle(tiny_checkpoint, config)
    halved = by_genai(config.output, [IDS], 8, tmp_path)[0]
    assert halved[0] == wanted
    np.testing.assert_allclose(halved[1], np.asarray(expected) / 2, rtol=1e-4, atol=1e-5)


def test_a_certificate_is_of_the_graphs_with_the_passes(
    export: Callable[..., Said], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """By a pass in a file, and a library named on the command line."""
    mine = tmp_path / "mine.py"
    mine.write_text("from support.custom_ops import halve_logits, split_signs\n")
    flags = ("--pass", f"{mine}:halve_logits", "--pass", f"{mine}:split_signs", "--custom-ops", LIBRARY)
    export(tiny_checkpoint, "-o", tmp_path / "out", *flags, "--quiet")
    manifest = Manifest.read(tmp_path / "out" / "manifest.json")
    assert manifest.certificate is not None
    assert manifest.certificate.prefill.kl_mean is not None
    assert manifest.certificate.prefill.kl_mean > 1e-4  # without the passes it is 0
    assert {"mine.py:halve_logits", "mine.py:split_signs"} <= {entry["pass"] for entry in manifest.passes}


def test_int4_takes_passes_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """After quantizing, and in the graph that is for specializing alone."""
    config = ExportConfig(tmp_path / "out", precision="int4", certificate=False, passes=(halve_logits,))
    manifest = export_bundle(tiny_checkpoint, config)
    done = [entry["graph"] for entry in manifest.passes if "halve_logits" in entry["pass"]]
    assert done == ["prefill", "decode", "score", "prefill_int8", "native"]
    assert manifest.plain is not None
    assert manifest.plain.graphs is not None
    plain = score(tmp_path / "out", Custom(passes=False))
    np.testing.assert_allclose(score(tmp_path / "out", Custom()), plain / 2, rtol=1e-5, atol=1e-6)


def test_a_module_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passes_of_mine.py").write_text(HEAD + "def nothing(model, report):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    (user,) = open_passes(["passes_of_mine:nothing"])
    assert user.name == "passes_of_mine:nothing"


NOT_FOUND: dict[str, tuple[str, tuple[str, ...]]] = {
    "no colon": ("mine", ("--pass mine: ", "module:function or file.py:function")),
    "no file": ("nowhere.py:f", ("--pass nowhere.py:f: no such file",)),
    "no module": ("satchel_nowhere:f", ("--pass satchel_nowhere:f: no module satchel_nowhere",)),
    "no function": ("json:nothing", ("--pass json:nothing: it has no nothing",)),
    "no callable": ("json:__name__", ("--pass json:__name__: ", "str")),
    "too many arguments": ("json:load", ("--pass json:load: takes",)),
}


@pytest.mark.parametrize("case", NOT_FOUND)
def test_what_is_no_pass_is_refused(refused: Callable[..., None], case: str, tiny_checkpoint: Path) -> None:
    given, says = NOT_FOUND[case]
    refused(tiny_checkpoint, "--pass", given, says=says)


FIRST = "node = next(n for n in model.graph if n.op_type == 'MatMul')\n    "
BROKEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "a syntax error": ("def f(model report):\n    pass\n", ("cannot be run: SyntaxError", "(line 3)")),
    "a file that fails": ("1 / 0\n", ("cannot be run: ZeroDivisionError: division by zero (mine.py, line 3)",)),
    "an exception": (
        "def f(model, report):\n    {}['key']\n",
        ("--pass mine.py:f: failed with KeyError: 'key' (mine.py, line 4)",),
    ),
    "another result": (
        "def f(model):\n    return model\n",
        ("--pass mine.py:f: failed with TypeError: it returned Model", "PassResult"),
    ),
    "a broken graph": (
        f"def f(model, report):\n    {FIRST}node.replace_input_with(0, model.graph.outputs[0])\n    report.count = 1\n",
        ("after the pass mine.py:f: node", "which nothing before it makes"),
    ),
    "another signature": (
        "def f(model, report):\n    model.graph.outputs[0].name = 'scores'\n    report.count = 1\n",
        ("after the pass mine.py:f: inputs and outputs changed", "scores"),
    ),
    "other values under an old name": (
        "from satchel.graphs.ir.values import weight\nfrom satchel.graphs.ir.weights import LazyWeight\n"
        f"def f(model, report):\n    {FIRST}old = weight(node.inputs[1])\n"
        "    node.inputs[1].const_value = LazyWeight(old.name, old.dims, old.dtype, lambda a, b: -old.rows(a, b))\n"
        "    report.count = 1\n",
        ("--pass mine.py:f: ", "weight", "a new name"),
    ),
    "an operator of no library": (
        "def f(model, report):\n    from support.custom_ops import split_signs\n    split_signs.edit(model, report)\n",
        ("the exported bundle does not run", "NegPos", "nothing was written: look at your --pass"),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_pass_that_fails_is_named_in_one_line(
    refused: Callable[..., None], case: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, says = BROKEN[case]
    mine = tmp_path / "mine.py"
    mine.write_text(HEAD + code)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    refused(tiny_checkpoint, "--pass", f"{mine}:f", "--no-certificate", says=says)


def test_libraries_are_refused(refused: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("not a library")
    mine = ("--pass", "support.custom_ops:halve_logits")
    for flags, says in (
        (("--custom-ops", LIBRARY), ("--custom-ops", "--pass")),
        ((*mine, "--custom-ops", tmp_path / "nowhere.so"), ("nowhere.so: cannot be read (No such file",)),
        ((*mine, "--custom-ops", text), ("text.so", "shared library")),
    ):
        refused(tiny_checkpoint, *flags, says=says)


def test_a_bundle_with_operators_is_specialized_with_its_library(
    satchel: Satchel, custom: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(custom, tmp_path / "bundle")
    assert "give --custom-ops" in satchel("specialize", bundle, "--quiet", code=2).err
    satchel("specialize", bundle, "--quiet", "--custom-ops", LIBRARY)
    manifest = Manifest.read(bundle / "manifest.json")
    assert manifest.specialized is not None
    assert manifest.plain is not None
    opened = open_bundle(bundle, custom=Custom((LIBRARY,)))
    assert opened.specialized is not None
    found = Engine.open(opened, threads=1).score(IDS)
    np.testing.assert_allclose(found, score(custom, Custom((LIBRARY,))), rtol=1e-4, atol=1e-5)
    satchel("specialize", bundle, "--quiet", "--remove")
    assert json.loads((bundle / "manifest.json").read_text()) == json.loads((custom / "manifest.json").read_text())


def test_a_cache_of_one_kind_of_graphs_is_not_taken_for_the_other(custom: Path) -> None:
    whole = open_bundle(custom, custom=Custom((LIBRARY,)))
    assert whole.fingerprint != open_bundle(custom, custom=Custom(passes=False)).fingerprint

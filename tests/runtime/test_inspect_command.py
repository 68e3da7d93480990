"""`satchel inspect`: what it says of a bundle, on a terminal, as JSON and as a page, and what it refuses."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chat_bundle import write_chat_bundle
from support.command import Satchel
from support.custom_ops import LIBRARY
from support.tiny_bundle import VOCABULARY, change_manifest, read_manifest, write_manifest
from support.tiny_custom_bundle import digest, write_custom_bundle
from support.tiny_static_bundle import write_static_bundle

from satchel.runtime.bundle import reader as bundle_module
from satchel.runtime.bundle import strict_json
from satchel.runtime.evaluation.certify import make_certificate
from satchel.runtime.execution.engine import Engine

LAYERS = {
    **{f"model.layers.{i}.mlp.up": {"bits": 4, "block": 32, "symmetric": False} for i in range(5)},
    **{f"model.layers.{i}.mlp.down": {"bits": 4 if i in (1, 2) else 8, "block": 32, "symmetric": True}
       for i in range(5)},
    "lm_head": {"bits": 8, "block": None, "symmetric": True, "decode_activations": "tensor"},
}  # fmt: skip
ACTIVATIONS = {"prefill_activations": "token", "decode_activations": "token"}
PASSES = [
    {"graph": "common", "pass": "fuse_norms", "count": 1200, "refusals": []},
    {"graph": "common", "pass": "fuse_gates", "count": 0, "refusals": [
        {"node": f"gate.{i}", "reason": "a bias <is> in the way"} for i in range(3)]},
    {"graph": "decode", "pass": "single_token", "count": 1, "refusals": []},
]  # fmt: skip


class Page(HTMLParser):
    """What a page holds: its tags, their attributes, and the text of its table cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data.strip()


@pytest.fixture
def changed(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the tiny bundle with keys of its manifest replaced."""

    def make(**keys: Any) -> Path:
        folder = tmp_path / "bundle"
        shutil.copytree(tiny, folder)
        write_manifest(folder, {**read_manifest(folder), **keys})
        return folder

    return make


@pytest.fixture
def rich(changed: Callable[..., Path], engine: Engine) -> Path:
    windows = [np.random.default_rng(2).integers(3, VOCABULARY, 20)]
    certificate = make_certificate(engine, engine.score, None, windows, [(0, 4, 8)], skip=4)
    return changed(
        layers={name: ACTIVATIONS | layer for name, layer in LAYERS.items()},
        passes=PASSES,
        precision="int4",
        recipe="mine",
        certificate=strict_json.to_json(certificate),
    )


def rows(out: str) -> list[list[str]]:
    """The cells of each line: they are two spaces apart or more."""
    return [re.split(r" {2,}", line.strip()) for line in out.splitlines()]


def test_the_facts_are_those_of_the_manifest(satchel: Satchel, rich: Path) -> None:
    out, err = satchel("inspect", rich)
    lines, weights = rows(out), (rich / "weights.bin").stat().st_size
    whole = sum(path.stat().st_size for path in rich.iterdir())
    assert err == ""
    assert ["source", "tiny (test, tiny)"] in lines
    assert ["precision", "int4, recipe mine"] in lines
    assert ["layers", "2 with 2 KV heads of 16"] in lines
    assert ["weights.bin", f"{weights:,}", f"{weights / whole:.1%}"] in lines
    assert ["all", f"{whole:,}"] in lines
    bits = 8 * weights / read_manifest(rich)["model"]["parameters"]
    assert [f"{whole / 1e3:.1f} kB; {bits:.2f} bits per weight"] in lines
    assert ["per token", "512 bytes"] in lines  # 2 layers x 2 heads x (16 + 16) numbers x 4 bytes
    assert ["decode", "decode.onnx", "its own", "session.disable_prepacking = 1"] in lines
    assert ["common", "fuse_norms 1,200"] in lines
    assert ["decode", "single_token 1"] in lines
    assert ["measured on", "1 windows of 20 tokens, the first 4 of each not counted"] in lines
    assert ["golden prompts", "1"] in lines
    kl = [line for line in lines if line[0] == "KL mean"]
    assert kl == [["KL mean", "0.00000", "0.00000"]]


def test_equal_layers_and_equal_refusals_are_one_line(satchel: Satchel, rich: Path) -> None:
    lines = rows(satchel("inspect", rich).out)
    start = lines.index(["Weights"])
    assert lines[start + 1 : start + 6] == [
        ["model.layers.*.mlp.up", "4 bits, group size 32, with zero points, int8 activations per token", "x 5"],
        ["model.layers.*.mlp.down", "8 bits, group size 32, symmetric, int8 activations per token",
         "x 3 (layers 0, 3-4)"],
        ["model.layers.*.mlp.down", "4 bits, group size 32, symmetric, int8 activations per token", "x 2 (layers 1-2)"],
        ["lm_head", "8 bits, per-channel, symmetric, int8 activations per token, in decode per tensor"],
        ["all other weights", "float32"],
    ]  # fmt: skip
    assert ["common", "fuse_gates", "gate.0 and 2 more", "a bias <is> in the way"] in lines


def test_a_float_bundle_that_nobody_certified(satchel: Satchel, tiny: Path) -> None:
    lines = rows(satchel("inspect", tiny).out)
    for line in (["all weights", "float32"], ["none: the export measured no accuracy"], ["nothing"]):
        assert line in lines


def test_json_is_one_object_on_one_line(satchel: Satchel, rich: Path) -> None:
    found = satchel.json("inspect", rich)
    assert found["bundle"] == str(rich)
    assert found["layers"] == {name: ACTIVATIONS | layer for name, layer in LAYERS.items()}
    assert found["cache_bytes"] == 64 * found["cache_bytes_per_token"] == 64 * 512
    assert found["files"] == {path.name: path.stat().st_size for path in rich.iterdir()}
    assert list(found["files"].values()) == sorted(found["files"].values(), reverse=True)
    assert found["passes"][1]["refusals"][2] == {"node": "gate.2", "reason": "a bias <is> in the way"}
    assert found["certificate"]["prompts"] == 1
    assert found["graphs"]["prefill"]["session"] == {"session.disable_prepacking": "1"}


def test_the_page_has_every_layer_and_refusal_and_loads_nothing(satchel: Satchel, rich: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("an old page", encoding="utf-8")
    assert satchel("inspect", rich, "--html", path).out.startswith(str(rich))
    page = Page(path)
    for cell in [*LAYERS, "gate.0", "gate.1", "gate.2", "a bias <is> in the way", "fuse_gates"]:
        assert cell in page.cells
    assert {"script", "link", "img", "iframe", "is"}.isdisjoint(page.tags)
    assert {"src", "href", "onload"}.isdisjoint(name for name, _ in page.attributes)
    assert "default-src 'none'; style-src 'unsafe-inline'" in [value for _, value in page.attributes]
    widths = [value for name, value in page.attributes if name == "style"]
    assert widths.count("width: 50.0%") == 7  # four bits of eight: five up, two down
    assert widths.count("width: 100.0%") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "page.html"]


PROVENANCE = {
    "options": {
        "precision": "fp32",
        "max_context": None,
        "certificate": True,
        "passes": [{"name": "mine.py:cut", "sha256": "1" * 64}],
        "calibrate": {"name": "book.txt", "sha256": "2" * 64},
    },
    "source": {"model.safetensors": {"bytes": 1_234_567, "sha256": "3" * 64}},
    "processor": ["x86_64", "avx2", "fma"],
    "threads": 12,
}


@pytest.fixture
def custom(tiny: Path, tmp_path: Path) -> Path:
    """A bundle with passes and a library of a user's own, and with what it was made of."""
    folder = write_custom_bundle(tmp_path / "custom", tiny)
    change_manifest(folder, "provenance", to=PROVENANCE)
    return folder


def test_passes_libraries_and_provenance_are_shown(satchel: Satchel, custom: Path) -> None:
    lines = rows(satchel("inspect", custom).out)
    for line in (
        ["needs", f"{LIBRARY.name}, SHA-256 {digest(LIBRARY)}"],
        ["decode", "decode.onnx", "its own", "session.disable_prepacking = 1"],
        ["plain decode", "plain_decode.onnx", "its own", "session.disable_prepacking = 1"],
        ["precision", "fp32"],
        ["certificate", "yes"],
        ["passes", f"mine.py:cut, SHA-256 {'1' * 64}"],
        ["calibrate", f"book.txt, SHA-256 {'2' * 64}"],
        ["processor", "x86_64, avx2, fma"],
        ["threads", "12"],
        ["model.safetensors", "1,234,567", "3" * 64],
    ):
        assert line in lines
    assert not [line for line in lines if line[0] == "max_context"]


def test_plain_static_graphs_are_named(satchel: Satchel, tmp_path: Path) -> None:
    folder = write_static_bundle(tmp_path / "static")
    document = read_manifest(folder)
    write_manifest(folder, {**document, "plain": {"graphs": None, "static": document["static"]}})
    found = satchel.json("inspect", folder)["graphs"]
    plain = {name.removeprefix("plain "): graph for name, graph in found.items() if name.startswith("plain ")}
    assert plain == {name: graph for name, graph in found.items() if not name.startswith("plain ")}
    assert len(plain) >= 3


HOSTILE = "\x1b[2J</style><script>alert(1)</script>"


def test_what_a_bundle_says_of_itself_is_not_trusted(
    satchel: Satchel, changed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = changed(
        producer={HOSTILE: HOSTILE},
        recipe=HOSTILE,
        layers={HOSTILE: ACTIVATIONS | {"bits": 10**400, "block": 10**400, "symmetric": True}},
        passes=[{"graph": HOSTILE, "pass": HOSTILE, "count": 1, "refusals": [{"node": HOSTILE, "reason": HOSTILE}]}],
    )
    out, _ = satchel("inspect", folder, "--html", tmp_path / "page.html")
    assert "\x1b" not in out
    assert out.count(r"\x1b[2J</style><script>alert(1)</script>") >= 6
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\x1b" not in text
    assert text.count("&lt;script&gt;") >= 6
    assert satchel.json("inspect", folder)["recipe"] == HOSTILE


def test_the_files_are_not_read(satchel: Satchel, rich: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("a file was hashed")

    monkeypatch.setattr(bundle_module, "sha256_of", refuse)
    size = (rich / "weights.bin").stat().st_size
    (rich / "weights.bin").write_bytes(bytes(size))
    satchel("inspect", rich)


def test_neither_numpy_nor_onnx_runtime_is_loaded(tiny: Path) -> None:
    code = "import sys; from satchel.runtime.cli import main as cli; cli.main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", code, "inspect", str(tiny)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1].split()
    assert "satchel.runtime.tools.inspection.inspection" in loaded
    assert {"numpy", "onnxruntime", "jinja2"}.isdisjoint(loaded)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "weights.bin").unlink(), "weights.bin: missing: copy the bundle again"),
        (lambda folder: (folder / "weights.bin").write_bytes(b"short"), "weights.bin: 5 bytes"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"{"), "manifest.json: not valid JSON"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json in it"),
        (lambda folder: shutil.rmtree(folder), "no such file or folder"),
        (lambda folder: spoil_passes(folder, {"graph": "common"}), "missing key 'passes[0].name'"),
        (lambda folder: spoil_passes(folder, {**PASSES[0], "count": "x"}), "'passes[0].count' must be a whole number"),
        (lambda folder: spoil_passes(folder, {**PASSES[0], "time": 1}), "unknown key 'passes[0].time'"),
        (lambda folder: spoil_cache(folder), "sizes are impossible"),
    ],
)
def test_a_bundle_that_is_damaged_is_one_line_and_exit_code_2(
    satchel: Satchel, changed: Callable[..., Path], tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = changed()
    spoil(folder)
    assert message in satchel.refuses("inspect", folder, "--html", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def spoil_passes(folder: Path, entry: dict[str, Any]) -> None:
    change_manifest(folder, "passes", to=[entry])


def spoil_cache(folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["kv_cache"]["layers"][0] |= {"kv_heads": 1 << 20, "key_dim": 1 << 20}
    manifest["model"]["max_context"] = 1 << 27
    write_manifest(folder, manifest)


def test_a_page_that_cannot_be_written_is_one_line_and_exit_code_2(
    satchel: Satchel, tiny: Path, tmp_path: Path
) -> None:
    for path, message in ((tmp_path, "this is a folder"), (tmp_path / "no" / "page.html", "there is no folder")):
        assert satchel.refuses("inspect", tiny, "--html", path).startswith(f"--html {path}: {message}")
    assert list(tmp_path.iterdir()) == []


def test_chat_templates_are_listed_by_name(satchel: Satchel, tiny: Path, tmp_path: Path) -> None:
    named = {"tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    folder = write_chat_bundle(tmp_path / "several", more_templates=named)
    assert sorted(satchel.json("inspect", folder, "--json")["templates"]) == ["default", "rag", "tool_use"]
    for place, wanted in ((folder, {"default", "rag", "tool_use"}), (tiny, {"none"})):
        (line,) = (line for line in satchel("inspect", place).out.splitlines() if line.strip().startswith("templates"))
        assert set(re.split(r"[ ,]+", line.strip())[1:]) == wanted


def test_the_length_beyond_which_angles_change_is_shown(
    satchel: Satchel, changed: Callable[..., Path], tiny: Path
) -> None:
    """The graphs of this bundle do not take it: only what a manifest says is read."""
    model, graphs = (read_manifest(tiny)[key] for key in ("model", "graphs"))
    length = {"name": "text_length", "dtype": "int64", "shape": ["batch", 1]}
    for graph in graphs.values():
        graph["inputs"].append(length)
    folder = changed(model={**model, "rotary_border": 20}, graphs=graphs)
    (line,) = (line for line in satchel("inspect", folder).out.splitlines() if line.strip().startswith("context"))
    assert "64 positions" in line and "20 tokens" in line

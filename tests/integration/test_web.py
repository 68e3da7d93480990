"""samples/web and samples/node: a bundle in a browser and in Node, with the tokens of satchel's own runner.

What needs packages of npm runs after `make test-web` has installed them; that also names bundles of a real model.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.conftest import CHECKOUT, NEW_TOKENS, PROMPT
from support.checkpoints import save_tiny
from support.genai import by_satchel
from support.node import answer, node
from support.tiny_hybrid import expected, write_hybrid

from satchel.export import ExportConfig, export_bundle
from satchel.runtime import Engine, Generator, open_bundle

WEB, NODE = CHECKOUT / "samples" / "web", CHECKOUT / "samples" / "node"
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "int8-cache": {"precision": "fp32", "kv_cache": "int8"},
}
IDS, COUNT = [418, 390, 17, 378, 378, 26, 166, 439, 426, 304, 180], 40
REAL = [Path(name) for name in os.environ.get("SATCHEL_WEB_BUNDLES", "").split()]
REMOTE = re.compile(r"(?:https?:)?//[\w-]+\.[\w.-]+")


def own_files(folder: Path) -> list[Path]:
    """The sample's files, without what npm installs and without the lock, which names each package's origin."""
    files = [path for path in folder.rglob("*") if path.is_file() and "node_modules" not in path.parts]
    return [path for path in files if path.name != "package-lock.json"]


@pytest.mark.parametrize("folder", [WEB, NODE], ids=lambda path: path.name)
def test_nothing_is_fetched_from_another_host(folder: Path) -> None:
    files = [path for path in own_files(folder) if path.suffix != ".md"]
    assert len(files) > 1
    assert [path.name for path in files if REMOTE.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("folder", [WEB, NODE], ids=lambda path: path.name)
def test_the_packages_and_their_versions_are_fixed(folder: Path) -> None:
    package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    lock = json.loads((folder / "package-lock.json").read_text(encoding="utf-8"))
    named = {**package["dependencies"], **package.get("devDependencies", {})}
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in named.values())
    installed = {place.removeprefix("node_modules/"): entry for place, entry in lock["packages"].items() if place}
    assert {name: installed[name]["version"] for name in named} == named
    assert all(entry["integrity"].startswith("sha512-") for entry in installed.values())


def test_the_stepping_alone() -> None:
    done = node(WEB, "--test", "test/satchel.test.mjs", packages=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE), done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("web") / "checkpoint", tokenizer=True)


@pytest.fixture(scope="module")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of a tiny model, by form."""
    folder = tmp_path_factory.mktemp("tiny")
    for form, options in FORMS.items():
        export_bundle(checkpoint, ExportConfig(folder / form, certificate=False, **options))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_webassembly_finds_the_tokens_of_satchel(form: str, request: pytest.FixtureRequest) -> None:
    arguments = _work(WEB, request, form)
    found = answer(node(WEB, "test/node.mjs", *arguments))
    assert found["greedy"] == found["best"] == json.loads(arguments[-1])


@pytest.mark.parametrize("form", [*FORMS, "int4"])
def test_onnxruntime_node_finds_them_by_the_steps_of_the_readme(form: str, request: pytest.FixtureRequest) -> None:
    folder, ids, tokens = _work(NODE, request, form)
    done = node(NODE, "step.mjs", folder, COUNT, ids)
    assert answer(done) == json.loads(tokens)


@pytest.mark.parametrize("sample", [WEB, NODE], ids=["web", "node"])
def test_layers_with_states_find_the_tokens_of_numpy(sample: Path, tmp_path: Path) -> None:
    node(sample, "--version")
    folder, ids = write_hybrid(tmp_path / "bundle"), [token % 400 for token in IDS]
    tokens = list(ids)
    for _ in range(COUNT):
        tokens.append(int(expected(tokens)[-1].argmax()))
    found, work = tokens[len(ids) :], json.dumps(ids)
    if sample == WEB:
        assert answer(node(WEB, "test/node.mjs", folder, work, json.dumps(found)))["greedy"] == found
    else:
        assert answer(node(NODE, "step.mjs", folder, COUNT, work)) == found


def _work(sample: Path, request: pytest.FixtureRequest, form: str) -> tuple[str, str, str]:
    """The bundle, a prompt's ids, and the COUNT tokens that satchel finds; skips first, before a bundle is made."""
    node(sample, "--version")
    tiny: Path = request.getfixturevalue("tiny")
    if form not in FORMS:
        export_bundle(
            request.getfixturevalue("checkpoint"), ExportConfig(tiny / form, certificate=False, precision=form)
        )
    ((tokens, _),) = by_satchel(Engine.open(open_bundle(tiny / form), threads=1), [IDS], COUNT)
    assert len(tokens) == COUNT
    assert len(set(tokens)) > 15
    return str(tiny / form), json.dumps(IDS), json.dumps(tokens)


def test_the_page_continues_a_prompt(request: pytest.FixtureRequest) -> None:
    node(WEB, "--version")
    bundle = request.getfixturevalue("tiny") / "fp32"
    _check_page(bundle, "a small boat", exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", REAL or [None], ids=lambda path: path.name if path else "none")
def test_the_page_continues_a_prompt_with_a_real_model(bundle: Path | None) -> None:
    if bundle is None:
        pytest.skip("SATCHEL_WEB_BUNDLES names no bundles: `make test-web` does it")
    precision = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["precision"]
    _check_page(bundle, PROMPT, exact=precision == "fp32")


def _check_page(bundle: Path, prompt: str, *, exact: bool) -> None:
    """The page finds satchel's tokens; where not `exact`, satchel's or one whose logit is as near as a kernel's error.

    That is the rule of `satchel verify`: either runner sees the two best within the certificate's margin.
    """
    generator = Generator.open(bundle, threads=2)
    assert generator.tokenizer is not None
    ids = [int(token) for token in generator.tokenizer.encode(prompt)]
    ((tokens, logits),) = by_satchel(generator.engine, [ids], NEW_TOKENS)
    work = {"prompt": prompt, "ids": ids, "tokens": tokens}
    found = answer(node(WEB, "test/browser.mjs", bundle.resolve(), json.dumps(work)))
    print(bundle.name, found["version"], found["ready"], found["status"])
    assert (found["elsewhere"], found["errors"]) == ([], [])
    assert "2 threads" in found["ready"] or os.cpu_count() != 2
    assert found["encoded"] == ids
    if exact:
        assert found["best"] == tokens
        text = generator.generate(prompt, max_new_tokens=len(tokens)).text
        assert found["text"] == prompt + text
        assert re.search(rf"^prompt {len(ids)} tokens at .*, new {len(tokens)} at [\d.]+ tokens/s$", found["status"])
        return
    certificate = generator.engine.bundle.manifest.certificate
    assert certificate is not None
    two = np.partition(logits, -2, axis=1)[:, -2:]
    near = np.minimum(found["gaps"], two[:, 1] - two[:, 0]) < certificate.margin.logit
    same = np.equal(found["best"], tokens)
    print(f"{same.sum()} of {len(same)} tokens are the same; the others: {[tokens[i] for i in np.flatnonzero(~same)]}")
    assert (same | near).all()
    assert same.mean() > 0.8

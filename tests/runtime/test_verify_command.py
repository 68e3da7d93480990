"""`satchel verify`: OK for the bundle that was certified, and a line for each mismatch of one that was changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from support.tiny_bundle import VOCABULARY, read_manifest, replace_file, write_manifest

from satchel.runtime.bundle import strict_json
from satchel.runtime.cli import main as cli
from satchel.runtime.evaluation.certify import make_certificate
from satchel.runtime.execution.engine import Engine


@pytest.fixture(scope="module")
def certified(tiny: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "certified"
    shutil.copytree(tiny, folder)
    windows = [np.random.default_rng(2).integers(3, VOCABULARY, 20)]
    certificate = make_certificate(engine, engine.score, None, windows, [(0, 4, 16), (0, 9, 8)], skip=4)
    write_manifest(folder, {**read_manifest(folder), "certificate": strict_json.to_json(certificate)})
    return folder


@pytest.fixture
def changed(certified: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy whose manifest is changed as told."""

    def make(change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> Path:
        folder = Path(shutil.copytree(certified, tmp_path / "changed"))
        manifest = read_manifest(folder)
        change(manifest)
        write_manifest(folder, manifest)
        return folder

    return make


def ran(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main(["verify", *map(str, arguments), "--threads", "1"])
    return (code, *capsys.readouterr())


def test_the_bundle_that_was_certified_holds(certified: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ran(capsys, certified)
    assert (code, err, out.splitlines()[-1]) == (0, "", "OK")
    code, out, err = ran(capsys, certified, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    found = json.loads(out)
    assert (found["bundle"], found["ok"], found["mismatches"]) == (str(certified), True, [])
    assert found["kl"]["found"] == pytest.approx(found["kl"]["recorded"], abs=1e-6)
    assert [(p["same_tokens"], p["new_tokens"]) for p in found["prompts"]] == [(16, 16), (8, 8)]
    assert found["onnxruntime"] == dict.fromkeys(("recorded", "found"), onnxruntime.__version__)


def test_other_weights_fail(certified: Path, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    weights = np.frombuffer((certified / "weights.bin").read_bytes(), np.float32).copy()
    weights[: len(weights) // 2] += 0.3
    folder = changed()
    replace_file(folder, "weights.bin", weights.tobytes())
    code, out, err = ran(capsys, folder)
    mismatches = [line for line in out.splitlines() if line.startswith("MISMATCH ")]
    assert (code, err) == (1, "")
    assert mismatches[0].startswith("MISMATCH prompt 1: KL ")
    assert mismatches[-1].startswith("MISMATCH all prompts: KL ")
    assert "OK" not in out
    code, out, _ = ran(capsys, folder, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert [f"MISMATCH {line}" for line in json.loads(out)["mismatches"]] == mismatches


def test_a_tokenizer_that_encodes_otherwise_fails(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def corpus(manifest: dict[str, Any]) -> None:
        manifest["tokenizer"]["corpus"] = [{"text": "the cat", "ids": [5]}]

    code, out, err = ran(capsys, changed(corpus))
    mismatches = [line for line in out.splitlines() if line.startswith("MISMATCH ")]
    assert (code, err, len(mismatches)) == (1, "", 1)
    assert "tokenizer.json" in mismatches[0]
    assert "the cat" in mismatches[0]


def test_a_bundle_without_certificate_cannot(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ran(capsys, tiny)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{tiny}: has no certificate" in err


def test_a_text_that_differs_after_a_near_tie_is_explained(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def other_token(manifest: dict[str, Any]) -> None:
        prompt = manifest["certificate"]["prompts"][0]
        prompt["greedy_ids"][6] = (prompt["greedy_ids"][6] + 1) % VOCABULARY
        prompt["gaps"][6] = 0.03

    code, out, _ = ran(capsys, changed(other_token))
    assert (code, out.splitlines()[-1]) == (0, "OK")
    assert "prompt 1: the text differs from token 7 on" in out
    assert "0.03 logits" in out
